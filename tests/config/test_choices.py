"""Choices lie in configs as data, and are those of the registries below."""

from collections.abc import Iterable
from typing import Any, get_args

import pytest

from dora_mm.adapting.parts import MODEL, full_name
from dora_mm.backend import BACKENDS
from dora_mm.config.adapter import AdapterConfig, ImageAdapterConfig, PartConfig, VLAdapterConfig
from dora_mm.config.generation import Axis, ConceptChoice, EvalDiffusionConfig, ImageGenerationConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, VLBartModelConfig, VLMModelConfig
from dora_mm.config.schema import Section
from dora_mm.config.training import ScheduleConfig, TrainConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.core.spec import CACHES, METHODS, NORM_GRADS
from dora_mm.eval.images import concepts, style
from dora_mm.models.folders import DTYPES
from dora_mm.models.images.schedulers import SCHEDULERS
from dora_mm.models.quantization import QUANTIZATIONS
from dora_mm.models.vl.vl_bart.loading import VISUAL
from dora_mm.preview.training import PRECISIONS
from dora_mm.registries.target_maps import TARGET_MAPS
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.targets import derived, find
from dora_mm.tasks.diffusion import DISTANCES
from dora_mm.train.schedule import SHAPES

REGISTRIES: list[tuple[type[Section], str, Iterable[str]]] = [
    (AdapterConfig, "method", METHODS),
    (AdapterConfig, "norm_grad", NORM_GRADS),
    (AdapterConfig, "cache", CACHES),
    (PartConfig, "method", (*METHODS, "frozen")),
    (TrainVLConfig, "backend", BACKENDS),
    (ImageGenerationConfig, "backend", BACKENDS),
    (ScheduleConfig, "name", SHAPES),
    (TrainConfig, "mixed_precision", ("no", *PRECISIONS)),
    (LossConfig, "type", DISTANCES),
    (ModelConfig, "dtype", DTYPES),
    (VLMModelConfig, "dtype", DTYPES),
    (VLMModelConfig, "quantization", QUANTIZATIONS.keys() - {"float8"}),
    (ModelConfig, "quantization", QUANTIZATIONS),
    (ModelConfig, "text_quantization", ("float8", "int8", "nf4")),
    (VLBartModelConfig, "visual", VISUAL),
    (ImageGenerationConfig, "scheduler", SCHEDULERS),
    (EvalDiffusionConfig, "style", style.CLASSES),
    (ConceptChoice, "role", (*concepts.ROLES, "all")),
]


def choices(annotation: Any) -> set[str]:
    """The texts that a type such as `Literal["a", "b"] | None` allows."""
    found = [choices(argument) if get_args(argument) else {argument} for argument in get_args(annotation)]
    return {text for texts in found for text in texts if isinstance(text, str)}


@pytest.mark.parametrize(
    ("section", "key", "registry"), REGISTRIES, ids=[f"{section.__name__}.{key}" for section, key, _ in REGISTRIES]
)
def test_a_key_has_the_choices_of_its_registry(section, key, registry):
    assert choices(section.model_fields[key].annotation) == set(registry)


def test_axes_are_settings_of_a_image():
    """But for the size, which is two of them, and for adapters, one of which or a checkpoint a cell names."""
    others = {"size", "adapter", "checkpoint"}
    assert choices(Axis.model_fields["name"].annotation) - others <= set(ImageRequest.__dataclass_fields__)


@pytest.mark.parametrize("name", TARGET_MAPS.built_in)
def test_the_record_of_a_target_map_has_its_parts_and_their_names(name):
    record, parts = TARGET_MAPS[name], find(name).parts
    assert record.parts == tuple(parts)
    assert set(record.names) == {full_name(network, part) for network in record.networks or (MODEL,) for part in parts}
    kinds = ImageAdapterConfig, VLAdapterConfig
    assert [bool(kind.parts_of(record)) for kind in kinds] == [bool(record.networks), not record.networks]


def test_parts_of_derived_maps_are_known():
    assert set(derived.PARTS) <= set(VLAdapterConfig.known_parts())

"""The training config in an adapter's file, and configs to generate as the contact sheets of that training were."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dora_mm.config.generation import ImageGenerationConfig, SampleConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.models import validated
from dora_mm.config.schema import ReferenceArea
from dora_mm.config.slider import SliderSampleConfig, TrainSliderConfig
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.models.images.families import distilled_of
from dora_mm.sampling.model import model_of
from dora_mm.utils import yaml12

log = logging.getLogger(__name__)
# Keys that `sample` of a training and configs of images share, and one that is in `data` of a training
OF_CONTACT_SHEETS = ("steps", "guidance", "guidance_rescale", "negative_prompt")
AREA = "reference_area"
ImagesT = TypeVar("ImagesT", bound=ImageGenerationConfig)


def training_of(file: Path) -> TrainDiffusionConfig | None:
    """The config that an adapter's header says it was trained with; None where it says none that is ours."""
    try:
        return validated(TrainDiffusionConfig, yaml12.read(read_metadata(file)["config"]).value)
    except (KeyError, ValueError, yaml.YAMLError):
        return None


def slider_of(file: Path) -> TrainSliderConfig | None:
    """The config of the slider that an adapter's header says; None where it says none."""
    try:
        return validated(TrainSliderConfig, yaml12.read(read_metadata(file)["config"]).value)
    except (KeyError, ValueError, yaml.YAMLError):
        return None


def contact_sheets_of(file: Path) -> dict[str, Any] | None:
    """How an adapter's training, maybe of an earlier version, generated its contact sheets; None: it does not say."""
    try:
        values = yaml12.read(read_metadata(file)["config"]).value
        is_slider = values.get("pipeline") == "train_slider"
        sheets = (SliderSampleConfig if is_slider else SampleConfig).model_validate(values["sample"])
        area = TypeAdapter(ReferenceArea).validate_python(values.get("data", {}).get(AREA, "pipeline"))
        return {**{key: getattr(sheets, key) for key in OF_CONTACT_SHEETS}, AREA: area}
    except (AttributeError, KeyError, TypeError, yaml.YAMLError, ValidationError):
        return None


def with_usual_settings(config: ImagesT, adapters: Mapping[str, Path]) -> ImagesT:
    """Fills settings that a config leaves out: a distilled model's own, else those of the training's samples.

    Args:
        config: The config of the images.
        adapters: The files of all adapters that are generated with; see `as_in_contact_sheets`.

    Raises:
        ValueError: There is no model, or the adapters name none.
    """
    model = config.model or model_of(adapters)
    if (found := distilled_of(model)) is None:
        return as_in_contact_sheets(config, adapters)
    own = {"steps": found.steps, "guidance": found.guidance}
    chosen = {key: value for key, value in own.items() if key not in config.model_fields_set}
    if chosen:
        shown = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        log.info("%s was distilled (%s), and so it generates with %s", model.path, found.evidence, shown)
    return config.model_copy(update=chosen)


def as_in_contact_sheets(config: ImagesT, adapters: Mapping[str, Path]) -> ImagesT:
    """Generates as the contact sheets of a training were generated, as far as a config leaves out how.

    Args:
        config: The config of the images.
        adapters: The files of all adapters that are generated with. Where their trainings differ in a key, the config's
            default holds, and a warning says so.

    Returns:
        The config, with the steps, guidance, its rescale, negative prompt and area of references of the training where
        it gives none.
    """
    sheets = [found for file in adapters.values() if (found := contact_sheets_of(file))]
    chosen = {}
    for key in (*OF_CONTACT_SHEETS, AREA):
        values = list(dict.fromkeys(found[key] for found in sheets))
        if key in config.model_fields_set or key not in type(config).model_fields or not values:
            continue
        if len(values) == 1:
            chosen[key] = values[0]
        else:
            found, own = " and ".join(map(_text, values)), _text(getattr(config, key))
            log.warning("The trainings of these adapters drew with %s %s, and this generates with %s", key, found, own)
    if shown := [f"{key} {_text(value)}" for key, value in chosen.items() if value not in (None, 0.0, "pipeline")]:
        log.info("Settings that a row does not give, as in the training's contact sheets: %s", ", ".join(shown))
    return config.model_copy(update=chosen)


def _text(value: float | str | None) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, int | float) else repr(value)

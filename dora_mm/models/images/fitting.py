"""Checks of an adapter file against a denoiser without weights: mistakes are found before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.models import weight_shape
from dora_mm.formats.reader import ModelNames
from dora_mm.formats.state import LayerState
from dora_mm.models.images.image_model import ImageModel


def denoiser_layers(file: AdapterFile, model: ImageModel, denoiser: nn.Module) -> Iterator[tuple[str, LayerState]]:
    """The adapters of modules of the denoiser by their paths, as the header of a file describes them, without values.

    Args:
        file: The adapter file.
        model: The model.
        denoiser: Its denoiser, see `ImageModel.empty_denoiser`.
    """
    groups, _ = file.groups(list(file.modules), ModelNames(file, {model.denoiser: denoiser}))
    for module, group in groups.items():
        if len(group.names) == 1 and group.names[0].component == model.denoiser:
            yield group.names[0].path, file.layer_shapes(module)


def changes_text(file: AdapterFile, model: ImageModel, denoiser: nn.Module) -> bool:
    """Whether prompts may be encoded otherwise with an adapter: it has more than adapters of the denoiser.

    Args:
        file: The adapter file.
        model: The model.
        denoiser: Its denoiser, see `ImageModel.empty_denoiser`.
    """
    names = ModelNames(file, {model.denoiser: denoiser})
    groups, _ = file.groups([*file.modules, *file.biases], names)
    of_denoiser = {m for m, group in groups.items() if {name.component for name in group.names} == {model.denoiser}}
    return bool(file.embeddings or file.others or {*file.modules, *file.biases} - of_denoiser)


def check_denoiser(file: AdapterFile, model: ImageModel, denoiser: nn.Module) -> None:
    """Checks that the modules which a file adapts are in the denoiser, with weights of the file's sizes.

    Raises:
        ValueError: They are not.
    """
    modules = dict(denoiser.named_modules())
    for path, layer in denoiser_layers(file, model, denoiser):
        name, start = f"{model.denoiser}.{path}", f"{file.path} does not fit this model: "
        if path not in modules:
            raise ValueError(f"{start}it adapts {name}, which the model does not have")
        shape, tensors = weight_shape(modules[path]), layer.tensors
        if shape is None or not {"lora_A", "lora_B"} <= tensors.keys():
            continue
        found = tuple(tensors[key].numel() // max(layer.spec.rank, 1) for key in ("lora_B", "lora_A"))
        if found != (shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"{start}at {name} it has {found[1]} inputs and {found[0]} outputs, and the model has "
                f"{math.prod(shape[1:])} and {shape[0]}"
            )

"""Which component a model is that was given without a name: its class tells for the networks of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.state import UNNAMED

_CLASSES = {
    "unet": r"diffusers\..*\.UNet2DConditionModel",
    "transformer": r"diffusers\..*\.\w*Transformer([23]D)?Model",
    "text_encoder": r"transformers\..*\.CLIPTextModel",
    "text_encoder_2": r"transformers\..*\.CLIPTextModelWithProjection",
}


def components_to_save(
    model: nn.Module | Mapping[str, nn.Module], known: Sequence[str], format: str
) -> dict[str, nn.Module]:
    """Names the component of a single model that will be saved.

    Args:
        model: The model, or a mapping of components, which is returned as it is.
        known: The components that the format has; empty where it takes any.
        format: The name of the format, for the message.

    Raises:
        ValueError: The format needs a name, and the class of the model does not tell which.
    """
    if isinstance(model, Mapping):
        return dict(model)
    name = component_of(model)
    if known and name not in known:
        raise ValueError(
            f"the {format} format needs the name of a component, which a {type(model).__name__} does not tell: "
            f'pass {{"{known[0]}": model}}, or another of {", ".join(known)}; for a model of your own, format="native"'
        )
    return {name or UNNAMED: model}


def components_to_load(model: nn.Module | Mapping[str, nn.Module], file: AdapterFile) -> dict[str, nn.Module]:
    """Names the component of a single model that a file will be loaded into.

    It is what its class tells, if the file has that component, or else the only component of the file. Of several
    models, a file that names none, as those of PEFT, is for the only one that has its modules.

    Args:
        model: The model, or a mapping of components.
        file: The adapter file.
    """
    own = [name for module in file.modules if (name := file.named(module)) is not None]
    names_in_file = (
        {name.component for name in own} if own else {key.partition(".")[0] for key in file.modules} & _CLASSES.keys()
    )
    names_in_file -= {""}  # of PEFT's files
    if isinstance(model, Mapping):
        path = own[0].path if own and not names_in_file else None
        fitting = {name: m for name, m in model.items() if path in dict(m.named_modules())}
        return fitting if len(fitting) == 1 else dict(model)
    name = component_of(model)
    if name not in names_in_file and len(names_in_file) == 1:
        return {names_in_file.pop(): model}
    return {name or UNNAMED: model}


def component_of(model: nn.Module) -> str | None:
    """The component that the class of a model, or a class that it is derived from (as in FSDP2), tells; else None."""
    for base in type(model).__mro__:
        for component, pattern in _CLASSES.items():
            if re.fullmatch(pattern, f"{base.__module__}.{base.__name__}"):
                return component
    return None

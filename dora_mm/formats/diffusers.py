"""diffusers' LoRA file, `pytorch_lora_weights.safetensors`, which `StableDiffusionXLPipeline.load_lora_weights` reads.

    unet.<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
    unet.<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
    unet.<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)

and the same for transformer.*, and for text_encoder.text_model.* and text_encoder_2.text_model.*, where the last key is
`lora_magnitude_vector.weight`. The header key `lora_adapter_metadata` holds PEFT's configuration as JSON with the same
prefixes: without it diffusers takes alpha = rank. The format is made for the methods `dora` and `lora`; `magnitude` is
written as DoRA of rank 1 with A = B = 0, which is the same function; `full` is not possible (see native.py).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_mm.formats.json_text import json_header
from dora_mm.formats.peft_layers import (
    LAYER_KEY,
    OUR_METADATA,
    check_config,
    layer_state,
    lora_config,
    missing_names,
    our_config,
    tensor_name,
    to_file,
    why_not_held,
)
from dora_mm.formats.state import AdapterState, joined, layers_of
from dora_mm.formats.tensor_file import read_tensors
from dora_mm.utils.atomic import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_METADATA = "lora_adapter_metadata"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = ("unet", "transformer", *TEXT_ENCODERS)
TEXT_PREFIX = "text_model."  # other tools expect it; diffusers removes it where transformers has dropped it

_KEY = re.compile(rf"(?P<component>{'|'.join(COMPONENTS)})\.{LAYER_KEY}")


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not(components: Mapping[str, nn.Module]) -> str | None:
    """Why diffusers could not hold or compute the adapters of these models, or None: see `Format.why_not`."""
    for component, model in components.items():
        if component not in COMPONENTS:
            return f"the diffusers format has no component {component!r}: it has {', '.join(COMPONENTS)}"
        if reason := why_not_held(component, model):
            return reason
    return None


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes pytorch_lora_weights.safetensors: see `Format.save`.

    Raises:
        ValueError: `state` has extra parameters, or `metadata` has a key that the format itself writes.
    """
    extra = [name for parameters in state.parameters.values() for name in parameters]
    if extra:
        raise ValueError(
            f"the diffusers format holds adapters only, and {extra[0]} was trained as well: save it as peft"
        )
    taken = {PEFT_METADATA, OUR_METADATA, "format"} & metadata.keys()
    if taken:
        raise ValueError(f"the metadata key {min(taken)!r} is written by the format itself: choose another name")
    tensors: dict[str, Tensor] = {}
    peft: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for component, layers in state.layers.items():
        model = components[component]
        adapted = layers_of(model)
        for path, layer in layers.items():
            for name, tensor in to_file(layer, adapted[path]).items():
                tensors[_file_key(component, path, name)] = tensor
        unprefixed = {_without_prefix(component, path): layer for path, layer in layers.items()}
        peft.update({f"{component}.{key}": value for key, value in lora_config(unprefixed, model).items()})
        ours[component] = our_config(layers)
    header = {"format": "pt", PEFT_METADATA: json.dumps(peft, sort_keys=True), OUR_METADATA: json.dumps(ours)}
    save_tensors(folder / FILE_NAME, tensors, {**metadata, **header})
    return folder / FILE_NAME


def _without_prefix(component: str, path: str) -> str:
    return path.removeprefix(TEXT_PREFIX) if component in TEXT_ENCODERS else path


def _file_key(component: str, path: str, name: str) -> str:
    if component not in TEXT_ENCODERS:
        return joined(component, path, name)
    # transformers 5 drops a magnitude whose key has no `.weight`; PEFT, which reads the others, accepts both.
    ending = ".weight" if name == "lora_magnitude_vector" else ""
    return joined(component, TEXT_PREFIX + _without_prefix(component, path), name + ending)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """Reads a file of diffusers' LoRA format: see `Format.read`.

    Args:
        path: The file.
        components: The models; they show how the installed version of transformers names the modules of text encoders.
            None keeps the names of the file.

    Returns:
        The adapter, and the metadata of the file's header.

    Raises:
        ValueError: The file is not in this format, or is damaged or incomplete, or diffusers would compute something
            else from it (see `check_config`).
    """
    tensors, metadata = read_tensors(path)
    grouped: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path} has the key {key}, which is not a key of diffusers' LoRA format: convert it first"
            )
        grouped[match["component"]][match["path"] or ""][tensor_name(match["name"])] = tensor
    if not grouped:
        raise ValueError(f"{path} is not an adapter file: it has no tensors")
    peft, ours = (json_header(path, metadata, key) for key in (PEFT_METADATA, OUR_METADATA))
    if not all(isinstance(value, dict) for value in ours.values()):
        raise ValueError(f"{path} has a header key {OUR_METADATA} whose values are not JSON objects")
    _check_complete(path, grouped, peft, ours)
    state = AdapterState({})
    for component, layers in grouped.items():
        config = {k.removeprefix(f"{component}."): v for k, v in peft.items() if k.startswith(f"{component}.")}
        check_config(path, config)
        renamed = _names_of(components.get(component) if components else None)
        state.layers[component] = {
            renamed(name): layer_state(path, joined(component, name), found, config, ours.get(component, {}))
            for name, found in layers.items()
        }
    return state, metadata


def is_key(key: str) -> bool:
    """Whether a key of a file is one of this format."""
    return _KEY.fullmatch(key) is not None


def _check_complete(
    path: Path, found: Mapping[str, Mapping[str, Any]], peft: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Checks that every module in the header of a file of ours is there; the headers of others may list patterns."""
    for component in ours:
        present = {_without_prefix(component, name) for name in found.get(component, {})}
        for name in missing_names(peft.get(f"{component}.target_modules", []), present):
            raise ValueError(f"{path} is incomplete: {component}.{name}, which its header lists, is missing")


def _names_of(model: nn.Module | None):
    """The function from paths in the file to paths in the model: transformers 5 drops `text_model.` in one encoder."""
    strip = model is not None and not hasattr(model, "text_model")
    return lambda name: name.removeprefix(TEXT_PREFIX) if strip else name

"""diffusers' LoRA file, `pytorch_lora_weights.safetensors`, which `StableDiffusionXLPipeline.load_lora_weights` reads.

    unet.<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
    unet.<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
    unet.<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)

and text_encoder.text_model.*, text_encoder_2.text_model.*, there with `lora_magnitude_vector.weight`. The header key
`lora_adapter_metadata` holds PEFT's configuration as JSON with the same prefixes: without it diffusers takes alpha =
rank. Methods `dora` and `lora` are what this format is made for; `magnitude` is written as DoRA of rank 1 with A = B =
0, which is the same function; `full` does not fit (see full.py).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_mm.core.inject import adapted_layers
from dora_mm.core.layer import matrix_shape
from dora_mm.formats.peft_layers import (
    OUR_METADATA,
    check_can_hold,
    json_header,
    layer_state,
    lora_config,
    our_config,
    to_file,
)
from dora_mm.formats.state import AdapterState, read_tensors
from dora_mm.utils.atomic import save_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TEXT_PREFIX = "text_model."  # other tools expect it; diffusers takes it off where transformers has dropped it

_KEY = re.compile(
    rf"(?P<component>{'|'.join(COMPONENTS)})\.(?P<path>.+)\."
    r"(?P<name>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes the state of {"unet": ..., "text_encoder": ..., ...} to folder/pytorch_lora_weights.safetensors.

    `metadata` goes into the header beside the keys that loaders need.
    """
    beside = [name for parameters in state.parameters.values() for name in parameters]
    if beside:
        raise ValueError(f"the diffusers format holds adapters alone, and {beside[0]} was trained too: save it as peft")
    unknown = [c for c in components if c not in COMPONENTS]
    if unknown:
        raise ValueError(f"the diffusers format has no component {unknown[0]!r}: it has {', '.join(COMPONENTS)}")
    taken = {PEFT_METADATA, OUR_METADATA, "format"} & metadata.keys()
    if taken:
        raise ValueError(f"the metadata key {min(taken)!r} is written by the format itself: choose another name")
    tensors: dict[str, Tensor] = {}
    peft: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for component, layers in state.layers.items():
        check_can_hold(component, layers, components[component])
        adapted = adapted_layers(components[component])
        for path, layer in layers.items():
            shape = matrix_shape(adapted[path])
            assert shape is not None
            for name, tensor in to_file(layer, shape).items():
                tensors[_file_key(component, path, name)] = tensor
        bare = {_bare(component, path): layer for path, layer in layers.items()}
        peft.update({f"{component}.{key}": value for key, value in lora_config(bare).items()})
        ours[component] = our_config(layers)
    header = {"format": "pt", PEFT_METADATA: json.dumps(peft, sort_keys=True), OUR_METADATA: json.dumps(ours)}
    save_tensors(folder / FILE_NAME, tensors, {**metadata, **header})
    return folder / FILE_NAME


def _bare(component: str, path: str) -> str:
    return path.removeprefix(TEXT_PREFIX) if component != "unet" else path


def _file_key(component: str, path: str, name: str) -> str:
    if component == "unet":
        return f"{component}.{path}.{name}"
    # transformers 5 drops a magnitude whose key has no `.weight`; PEFT, which reads the UNet's, takes either.
    ending = ".weight" if name == "lora_magnitude_vector" else ""
    return f"{component}.{TEXT_PREFIX}{_bare(component, path)}.{name}{ending}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """(state, header metadata) of a file. `components` tells how this version of transformers names text encoders'
    modules; without them the names are the file's."""
    tensors, metadata = read_tensors(path)
    grouped: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path} has the key {key}, which is not one of diffusers' LoRA format: convert it first")
        grouped[match["component"]][match["path"]][match["name"].split(".")[0]] = tensor
    if not grouped:
        raise ValueError(f"{path} holds no adapter: it has no tensors")
    peft, ours = (json_header(path, metadata, key) for key in (PEFT_METADATA, OUR_METADATA))
    _check_complete(path, grouped, peft, ours)
    state = AdapterState({})
    for component, layers in grouped.items():
        config = {k.removeprefix(f"{component}."): v for k, v in peft.items() if k.startswith(f"{component}.")}
        renamed = _names_of(components.get(component) if components else None)
        state.layers[component] = {
            renamed(name): layer_state(path, f"{component}.{name}", found, config, ours.get(component, {}))
            for name, found in layers.items()
        }
    return state, metadata


def _check_complete(
    path: Path, found: Mapping[str, Mapping[str, Any]], peft: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Every module that the header of a file of ours names must be there; others' headers may name patterns."""
    for component in ours:
        present = {_bare(component, name) for name in found.get(component, {})}
        for name in peft.get(f"{component}.target_modules", []):
            if name not in present:
                raise ValueError(f"{path} lacks {component}.{name}, which its header names: it is incomplete")


def _names_of(model: nn.Module | None):
    """How file paths become the model's: transformers 5 has dropped `text_model.` from one of the two encoders."""
    strip = model is not None and not hasattr(model, "text_model")
    return lambda name: name.removeprefix(TEXT_PREFIX) if strip else name

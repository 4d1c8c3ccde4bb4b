"""Weights trained by method full, `trained_weights.safetensors`: `unet.<path>.weight` for each trained module.

No adapter format can hold them, so this one is our own: complete weights, in the dtype they were trained in. Extra
parameters (`unet.<name>`), such as biases and norms, are listed in the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.peft_layers import json_header
from dora_mm.formats.state import AdapterState, LayerState, read_tensors
from dora_mm.utils.atomic import save_tensors

FILE_NAME = "trained_weights.safetensors"
FORMAT_KEY, FORMAT = "dora_mm_format", "full-1"
COUNT_KEY = "dora_mm_weights"
EXTRA_KEY = "dora_mm_parameters"


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes trained_weights.safetensors: see `Format.save`.

    Raises:
        ValueError: A layer was trained with another method.
    """
    tensors = {}
    for component, layers in state.layers.items():
        for path, layer in layers.items():
            if layer.spec.method != "full":
                raise ValueError(
                    f"{component}.{path} has an adapter of method {layer.spec.method}: save it as diffusers"
                )
            tensors[f"{component}.{path}.weight"] = layer.tensors["weight"]
    extra = {f"{c}.{name}": p.detach() for c, found in state.parameters.items() for name, p in found.items()}
    tensors |= extra
    header = {FORMAT_KEY: FORMAT, COUNT_KEY: str(len(tensors)), EXTRA_KEY: json.dumps(list(extra))}
    save_tensors(folder / FILE_NAME, tensors, {**metadata, **header})
    return folder / FILE_NAME


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """Reads a file of this format: see `Format.read`. The names are always those of the file.

    Raises:
        ValueError: The file is not in this format, or is damaged or incomplete.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise ValueError(f"{path} is not a file of trained weights: its header does not have {FORMAT_KEY} = {FORMAT}")
    if metadata.get(COUNT_KEY) != str(len(tensors)):
        raise ValueError(
            f"{path} is damaged: it holds {len(tensors)} weights, and its header says {metadata.get(COUNT_KEY)}"
        )
    state = AdapterState({})
    spec = DoRASpec(method="full")
    extra = json_header(path, metadata, EXTRA_KEY, list)
    if missing := [name for name in extra if not isinstance(name, str) or name not in tensors]:
        raise ValueError(f"{path} is incomplete: {missing[0]}, which its header lists, is missing")
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if key in extra:
            state.parameters.setdefault(component, {})[rest] = tensor
            continue
        if not rest.endswith(".weight"):
            raise ValueError(f"{path} is damaged: its key {key} is not a weight")
        state.layers.setdefault(component, {})[rest.removesuffix(".weight")] = LayerState(spec, {"weight": tensor})
    return state, metadata

"""Our own file, `trained_weights.safetensors`, for what no other tool has a format for.

    <component>.<path>.lora_A      (R, I), of a convolution (R, I / groups, *K)
    <component>.<path>.lora_B      (O, R)
    <component>.<path>.magnitude   (O,)
    <component>.<path>.weight      the whole weight, of method `full`
    <component>.<name>             an extra parameter, such as a bias or a norm

It holds adapters of any method on any layer, in the dtype they were trained in. The header has the settings of every
layer and the names of the extra parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.json_text import json_header
from dora_mm.formats.state import AdapterState, LayerState, joined, layers_of
from dora_mm.formats.tensor_file import read_tensors
from dora_mm.utils.atomic import save_tensors

FILE_NAME = "trained_weights.safetensors"
COMPONENTS = ()  # any
FORMAT_KEY, FORMAT = "dora_mm_format", "native-1"
SPECS_KEY = "dora_mm_specs"
EXTRA_KEY = "dora_mm_parameters"
OLD_FORMAT, OLD_COUNT_KEY = "full-1", "dora_mm_weights"  # files before native-1, for method `full` alone

_SETTINGS = ("rank", "alpha", "dropout", "method", "norm_grad")
_TENSORS = {
    "dora": ("lora_A", "lora_B", "magnitude"),
    "lora": ("lora_A", "lora_B"),
    "magnitude": ("magnitude",),
    "full": ("weight",),
}


def why_not(components: Mapping[str, nn.Module]) -> str | None:
    """Why the format cannot hold the adapters of these models: it can hold all."""
    return None


def header_of(components: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """The header of a file of trained parameters, with which `read` reads it as an adapter.

    Args:
        components: The adapted models by component.
        names: The names of all trained parameters, each with its component in front.
    """
    layers = {component: layers_of(model) for component, model in components.items()}
    specs = {c: {path: layer.adaptation.spec for path, layer in found.items()} for c, found in layers.items() if found}
    own = {
        joined(component, path, name)
        for component, found in layers.items()
        for path, layer in found.items()
        for name in layer.adapter_tensors()
    }
    return _header(specs, [name for name in names if name not in own])


def _header(specs: Mapping[str, Mapping[str, DoRASpec]], extra: Sequence[str]) -> dict[str, str]:
    plain = {
        component: {path: {key: getattr(spec, key) for key in _SETTINGS} for path, spec in layers.items()}
        for component, layers in specs.items()
    }
    return {FORMAT_KEY: FORMAT, SPECS_KEY: json.dumps(plain), EXTRA_KEY: json.dumps(list(extra))}


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes trained_weights.safetensors: see `Format.save`."""
    tensors: dict[str, Tensor] = {}
    for component, layers in state.layers.items():
        for path, layer in layers.items():
            tensors |= {joined(component, path, name): tensor for name, tensor in layer.tensors.items()}
    extra = {joined(c, name): p for c, found in state.parameters.items() for name, p in found.items()}
    specs = {
        component: {path: layer.spec for path, layer in layers.items()} for component, layers in state.layers.items()
    }
    save_tensors(folder / FILE_NAME, {**tensors, **extra}, {**metadata, **_header(specs, list(extra))})
    return folder / FILE_NAME


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """Reads a file of this format: see `Format.read`. The names are always those of the file.

    Raises:
        ValueError: The file is not in this format, or is damaged or incomplete.
    """
    tensors, metadata = read_tensors(path)
    version = metadata.get(FORMAT_KEY)
    if version not in (FORMAT, OLD_FORMAT):
        raise ValueError(f"{path} is not a file of trained weights: its header does not have {FORMAT_KEY} = {FORMAT}")
    parameters = _take_parameters(path, tensors, json_header(path, metadata, EXTRA_KEY, list))
    if version == OLD_FORMAT:
        count = sum(map(len, parameters.values())) + len(tensors)
        if metadata.get(OLD_COUNT_KEY) != str(count):
            raise ValueError(
                f"{path} is damaged: it holds {count} weights, and its header says {metadata.get(OLD_COUNT_KEY)}"
            )
        specs = _old_specs(path, tensors)
    else:
        specs = _specs(path, json_header(path, metadata, SPECS_KEY))
    layers = {
        component: {name: LayerState(spec, _take(path, tensors, component, name, spec)) for name, spec in found.items()}
        for component, found in specs.items()
    }
    if tensors:
        raise ValueError(f"{path} is damaged: its header does not list {min(tensors)}")
    return AdapterState(layers, parameters), metadata


def _take_parameters(path: Path, tensors: dict[str, Tensor], names: list[Any]) -> dict[str, dict[str, Tensor]]:
    """Removes the extra parameters from `tensors`; returns them by component and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in names:
        if not isinstance(key, str) or key not in tensors:
            raise ValueError(f"{path} is incomplete: {key!s:.200}, which its header lists, is missing")
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = tensors.pop(key)
    return found


def _take(path: Path, tensors: dict[str, Tensor], component: str, layer: str, spec: DoRASpec) -> dict[str, Tensor]:
    """Removes the tensors of a layer from `tensors`; returns them by name."""
    keys = {name: joined(component, layer, name) for name in _TENSORS[spec.method]}
    if missing := [key for key in keys.values() if key not in tensors]:
        raise ValueError(f"{path} is incomplete: {missing[0]}, which its header lists, is missing")
    return {name: tensors.pop(key) for name, key in keys.items()}


def _specs(path: Path, header: dict[str, Any]) -> dict[str, dict[str, DoRASpec]]:
    try:
        return {c: {name: DoRASpec(**spec) for name, spec in layers.items()} for c, layers in header.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has an invalid header key {SPECS_KEY}: {error}") from error


def _old_specs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, DoRASpec]]:
    specs: dict[str, dict[str, DoRASpec]] = {}
    for key in tensors:
        component, _, rest = key.partition(".")
        if not rest.endswith(".weight"):
            raise ValueError(f"{path} is damaged: its key {key} is not a weight")
        specs.setdefault(component, {})[rest.removesuffix(".weight")] = DoRASpec(method="full")
    return specs

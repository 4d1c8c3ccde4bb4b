"""An adapter between file and model: what every format is read into, and written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer, DoRASpec
from dora_mm.core.attention import with_projections
from dora_mm.core.fused import TORCH, Forward
from dora_mm.core.inject import InjectReport, describe, inject_paths
from dora_mm.core.layer import matrix_shape


@dataclass(frozen=True)
class LayerState:
    """The adapter of one module: its tensors by name (lora_A, lora_B, magnitude, or weight for method full)."""

    spec: DoRASpec
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterState:
    """By component ("unet"): the adapters by module path, and by name parameters that were trained beside them."""

    layers: dict[str, dict[str, LayerState]]
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def from_models(
    components: Mapping[str, nn.Module], extra_parameters: Sequence[str] = (), strength: float = 1.0
) -> AdapterState:
    """The adapters of these models, changed so that their strength 1 is this strength; components without are left out.

    extra_parameters: names of parameters that were trained beside the adapters of a single model.
    """
    state = AdapterState({})
    for component, model in components.items():
        layers = _adapted(model)
        for path, layer in layers.items():
            if layer.stacked:
                raise ValueError(
                    f"{component}.{path} holds several adapters: save each from a model that holds it alone"
                )
        if layers:
            state.layers[component] = {
                path: LayerState(layer.spec, layer.tensors_at(strength)) for path, layer in layers.items()
            }
    if extra_parameters:
        if len(components) != 1:
            raise ValueError("parameters beside adapters are saved of one model at a time")
        if strength != 1:
            raise ValueError(f"{extra_parameters[0]} was trained itself and has no strength: save it at strength 1")
        component, model = next(iter(components.items()))
        state.parameters[component] = {name: model.get_parameter(name) for name in extra_parameters}
    if not state.layers:
        raise ValueError(f"nothing to save: no layer of {', '.join(components)} is adapted")
    return state


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header metadata) of a safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def into_models(
    state: AdapterState,
    components: Mapping[str, nn.Module],
    source: Path,
    *,
    strength: float = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
) -> InjectReport:
    """Puts adapters into models: bare modules are adapted as the state says.

    Modules adapted under the same name must match the state exactly, and take its values. Under another name the
    adapter is stacked upon what is there, for inference. Parameters that were trained beside the adapters take the
    place of the model's own: they have no strength, are not stacked, and `remove` does not bring the old ones back.
    Everything is checked before anything is changed; `source` is the file that errors name.
    """
    surplus = [c for c in {**state.layers, **state.parameters} if c not in components]
    if surplus:
        raise ValueError(
            f"{source} also adapts {', '.join(surplus)}, and only {', '.join(components)} was given to load it into"
        )
    for component, layers in state.layers.items():
        _check_component(layers, component, components[component], source, strength, name)
    for component, parameters in state.parameters.items():
        _check_parameters(parameters, components[component], source, strength, name)
    for component, layers in state.layers.items():
        adapted = _adapted(components[component])
        fresh = {path: (component, layer.spec) for path, layer in layers.items() if path not in adapted}
        inject_paths(components[component], fresh, forward=forward, name=name)
    for component, parameters in state.parameters.items():
        own = _own_tensors(components[component])
        for key, tensor in parameters.items():
            own[key].data.copy_(tensor)
    modules = []
    for component, layers in state.layers.items():
        for path, layer in _adapted(components[component]).items():
            if path not in layers:
                continue
            if layer.name == name:
                _fill(layer, layers[path], strength)
            else:
                layer.stack(name, layers[path].spec, layers[path].tensors, strength)
            modules.append(describe(layer, component))
    return InjectReport(tuple(modules))


@torch.no_grad()
def _fill(layer: AdaptedLayer, state: LayerState, strength: float) -> None:
    if _has_rank(state.spec):
        layer.spec = replace(layer.spec, alpha=state.spec.alpha)
    for name, parameter in layer.adapter_tensors().items():
        parameter.copy_(state.tensors[name])
    if layer.spec.method != "full":
        layer.set_strength(strength, layer.name)


def _has_rank(spec: DoRASpec) -> bool:
    """Whether rank and alpha mean anything."""
    return spec.method in ("dora", "lora")


def _adapted(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def _check_component(
    layers: Mapping[str, LayerState], component: str, model: nn.Module, source: Path, strength: float, name: str
) -> None:
    modules = with_projections(dict(model.named_modules()))
    for path, state in layers.items():
        if path not in modules:
            raise ValueError(
                f"{source} was made for another architecture: it adapts {component}.{path}, which this model lacks"
            )
        shape = matrix_shape(modules[path])
        if shape is None or (problem := _misfit(state, shape)):
            kind = type(modules[path]).__name__
            reason = problem if shape else f"it is a {kind} here"
            raise ValueError(f"{source} was made for another architecture: {component}.{path} does not fit, {reason}")
        if state.spec.method == "full" and strength != 1:
            raise ValueError(f"{source} holds whole weights, which have no strength: load it with strength 1")
    present = _adapted(model)
    same = {path: layer for path, layer in present.items() if layer.name == name}
    for path, layer in present.items():
        layer.check_can_merge()
        if path in layers and path not in same:
            layer.check_can_stack(name, layers[path].spec)
    if same:
        _check_same_layers(layers, same, component, source)


def _check_parameters(
    parameters: Mapping[str, Tensor], model: nn.Module, source: Path, strength: float, name: str
) -> None:
    own = _own_tensors(model)
    others = sorted({layer.name for layer in _adapted(model).values()} - {name})
    for key, tensor in parameters.items():
        if key not in own:
            raise ValueError(f"{source} was made for another architecture: it holds {key}, which this model lacks")
        if own[key].shape != tensor.shape:
            found, needed = tuple(tensor.shape), tuple(own[key].shape)
            raise ValueError(f"{source} was made for another architecture: its {key} is {found} and should be {needed}")
        if strength != 1:
            raise ValueError(
                f"{source} holds {key}, which was trained itself and has no strength: load it with strength 1"
            )
        if others:
            raise ValueError(
                f"{source} holds {key}, which was trained itself and cannot be stacked upon the adapter {others[0]!r}: "
                "call remove first"
            )


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By name, the buffers too: with `bias="all"` PEFT before 0.21 saves those whose name holds "bias"."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _misfit(state: LayerState, shape: tuple[int, ...]) -> str:
    """Why the tensors do not fit a weight, in words; empty when they do."""
    out_features, *inner = shape
    rank = state.spec.rank
    expected = {
        "lora_A": (rank, *inner),
        "lora_B": (out_features, rank),
        "magnitude": (out_features,),
        "weight": shape,
    }
    for name, tensor in state.tensors.items():
        if tuple(tensor.shape) != expected[name]:
            return f"its {name} is {tuple(tensor.shape)} and should be {expected[name]}"
    return ""


def _check_same_layers(
    layers: Mapping[str, LayerState], adapted: Mapping[str, AdaptedLayer], component: str, source: Path
) -> None:
    for path in adapted:
        if path not in layers:
            raise ValueError(f"{source} lacks {component}.{path}, which this model adapts: call remove first")
    for path, state in layers.items():
        if path not in adapted:
            raise ValueError(f"{source} also adapts {component}.{path}, which this model does not: call remove first")
        needed, found = (_kind(spec) for spec in (adapted[path].spec, state.spec))
        if needed != found:
            raise ValueError(
                f"{source} holds {found} for {component}.{path}, and the model was adapted with {needed}: choose the "
                "file's, or call remove first"
            )


def _kind(spec: DoRASpec) -> str:
    return f"{spec.method} of rank {spec.rank}" if _has_rank(spec) else spec.method

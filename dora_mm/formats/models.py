"""Adapters in their neutral form, taken out of models and put into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.full_weight import TrainedWeight
from dora_mm.core.inject import InjectReport, describe, inject_paths
from dora_mm.core.kinds import adapted_class
from dora_mm.core.layer import TransposedLayer
from dora_mm.core.spec import DoRASpec
from dora_mm.core.strength import Strength, strengths_of
from dora_mm.core.wrappers.attention import PackedProjection
from dora_mm.core.wrappers.experts import ExpertProjection
from dora_mm.core.wrappers.quantized import DoRAQuantized, is_quantized
from dora_mm.core.wrappers.separation import with_projections
from dora_mm.core.wrappers.sharded import gathered, reshard, write
from dora_mm.formats.state import UNNAMED, AdapterState, LayerState, check_finite, joined
from dora_mm.targets import SHORT_NAMES


def from_models(components: Mapping[str, nn.Module], extra_parameters: Sequence[str] = ()) -> AdapterState:
    """Takes the adapters out of models, but for those of an assistant; the models are not changed.

    Tensors that FSDP2 has sharded are gathered, so every process has to call this.

    Args:
        components: The models by component; those without an adapter are left out of the result.
        extra_parameters: Names of parameters that were trained in addition to the adapters of a single model.

    Raises:
        ValueError: No layer is adapted, a layer has several adapters, or `extra_parameters` are given with several
            models.
    """
    state = AdapterState({})
    for component, model in components.items():
        reshard(model)
        layers = saved_layers(model)
        for path, layer in layers.items():
            if not all(other.assists for other in layer.adaptation.stacked.values()):
                raise ValueError(
                    f"{joined(component, path)} has several adapters: save each one from a model that has only it"
                )
        if layers:
            state.layers[component] = {path: _state_of(layer) for path, layer in layers.items()}
    if extra_parameters:
        if len(components) != 1:
            raise ValueError(f"extra_parameters belong to a single model, and {', '.join(components)} were given")
        component, model = next(iter(components.items()))
        state.parameters[component] = {name: gathered(model.get_parameter(name)) for name in extra_parameters}
    if not state.layers:
        raise ValueError(f"nothing to save: no layer of {', '.join(components)} is adapted")
    return state


def _state_of(layer: AdaptedLayer) -> LayerState:
    tensors = {name: gathered(tensor) for name, tensor in layer.adapter_tensors().items()}
    return LayerState(layer.adaptation.spec, tensors)


def into_models(
    state: AdapterState,
    components: Mapping[str, nn.Module],
    source: Path,
    *,
    strength: Strength = 1.0,
    name: str = "default",
    forward: Forward = TORCH,
    assists: bool = False,
) -> InjectReport:
    """Puts adapters into models; modules that are not adapted yet are adapted with the spec in the state.

    Modules that have an adapter of the same name must match the state exactly, and receive its values. An adapter of
    another name is stacked on top of the existing one, for inference. Extra parameters overwrite those of the model:
    they have no strength, are not stacked, and `remove` does not restore the old values.

    Args:
        state: The adapters.
        components: The models by component.
        source: The file that the state comes from, for messages.
        strength: The strength of the adapters; names of parts begin with the component.
        name: The name of the adapter.
        forward: The function that runs newly adapted layers.
        assists: Whether it is an assistant, which is frozen and not saved with others: see `core.Adaptation`.

    Returns:
        The layers that the state adapts.

    Raises:
        ValueError: The state does not fit the models. Everything is checked before anything is changed.
    """
    surplus = [c for c in {**state.layers, **state.parameters} if c not in components]
    if surplus:
        raise ValueError(
            f"{source} also adapts {', '.join(surplus)}, but it is being loaded into {', '.join(components)} only"
        )
    paths = [joined(c, path) for c, layers in state.layers.items() for path in layers]
    strengths = strengths_of(strength, paths, SHORT_NAMES)
    for component, layers in state.layers.items():
        gathered = state.parameters.get(component, {})
        _check_component(layers, component, components[component], source, strengths, name, gathered)
    for component, parameters in state.parameters.items():
        untied = state.untied.get(component, set())
        _check_parameters(parameters, untied, components[component], source, strength, name)
    check_finite(state, source)
    for component, layers in state.layers.items():
        adapted = layers_of(components[component])
        fresh = {path: (component, layer.spec) for path, layer in layers.items() if path not in adapted}
        if fresh:
            inject_paths(components[component], fresh, forward=forward, name=name)
    for component, parameters in state.parameters.items():
        for key in state.untied.get(component, ()):
            _untie(components[component], key)
        own = _own_tensors(components[component])
        for key, tensor in parameters.items():
            write(own[key].data, tensor)
    modules = []
    for component, layers in state.layers.items():
        for path, layer in layers_of(components[component]).items():
            if path not in layers:
                continue
            state_of, at = layers[path], strengths[joined(component, path)]
            if layer.adaptation.name == name:
                _fill(layer, state_of, at, assists=assists)
            else:
                layer.stack(name, state_of.spec, state_of.tensors, at, assists=assists)
            modules.append(describe(layer, "" if component == UNNAMED else component))
    return InjectReport(tuple(modules))


@torch.no_grad()
def _fill(layer: AdaptedLayer, state: LayerState, strength: float, *, assists: bool) -> None:
    if _has_rank(state.spec):
        layer.adaptation.spec = replace(layer.adaptation.spec, alpha=state.spec.alpha)
    for name, parameter in layer.adapter_tensors().items():
        write(parameter, state.tensors[name])
        parameter.requires_grad_(parameter.requires_grad and not assists)
    layer.adaptation.assists = assists
    if not isinstance(layer, TrainedWeight):
        layer.set_strength(strength, layer.adaptation.name)


def _has_rank(spec: DoRASpec) -> bool:
    """Whether rank and alpha have a meaning."""
    return spec.method in ("dora", "lora")


def layers_of(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by path; empty where there are none."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def saved_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers whose adapters a file of a model has, by path: those that not only an assistant adapts."""
    return {path: layer for path, layer in layers_of(model).items() if not layer.adaptation.assists}


def _check_component(
    layers: Mapping[str, LayerState],
    component: str,
    model: nn.Module,
    source: Path,
    strengths: Mapping[str, float],
    name: str,
    parameters: Collection[str],
) -> None:
    modules = with_projections(dict(model.named_modules()))
    for path, state in layers.items():
        if path not in modules:
            raise ValueError(
                f"{source} does not fit this model: it adapts {joined(component, path)}, which the model does not have"
            )
        if problem := _misfit(state, modules[path]):
            raise ValueError(f"{source} does not fit this model: at {joined(component, path)}, {problem}")
        if state.spec.method == "full" and strengths[joined(component, path)] != 1:
            raise ValueError(f"{source} holds weights of method full, which have no strength: load it with strength 1")
    present = layers_of(model)
    trained = {path for path, m in present.items() if isinstance(m, TrainedWeight) and f"{path}.weight" in parameters}
    same = {path: m for path, m in present.items() if m.adaptation.name == name and path not in trained}
    for path, layer in present.items():
        layer.check_not_merged()
        if path in layers and path not in same:
            layer.check_can_stack(name, layers[path].spec)
    if same:
        _check_same_layers(layers, same, component, source)


def _check_parameters(
    parameters: Mapping[str, Tensor],
    untied: Collection[str],
    model: nn.Module,
    source: Path,
    strength: Strength,
    name: str,
) -> None:
    own = _own_tensors(model)
    written: dict[int, str] = {}  # by the tensor in the model
    others = sorted({layer.adaptation.name for layer in layers_of(model).values()} - {name})
    for key, tensor in parameters.items():
        if key not in own:
            raise ValueError(f"{source} does not fit this model: it holds {key}, which the model does not have")
        if own[key].shape != tensor.shape:
            found, needed = tuple(tensor.shape), tuple(own[key].shape)
            raise ValueError(f"{source} does not fit this model: its {key} has shape {found} instead of {needed}")
        if strength != 1:
            raise ValueError(f"{source} holds the parameter {key}, which has no strength: load it with strength 1")
        if others:
            raise ValueError(
                f"{source} holds the parameter {key}, which cannot be stacked on top of the adapter {others[0]!r}: "
                "call remove first"
            )
        if key not in untied:
            first = written.setdefault(id(own[key]), key)
            if not tensor.equal(parameters[first]):
                raise ValueError(
                    f"{source} holds different values for {first} and {key}, which share one weight in this model: "
                    "load it with tie_word_embeddings=False"
                )


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: with `bias="all"` PEFT before 0.21 saves buffers whose name contains "bias"."""
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def is_shared(model: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of a model has several names, as that of an embedding to which a head is tied."""
    own = _own_tensors(model)
    return sum(other is own[name] for other in own.values()) > 1


def _untie(model: nn.Module, name: str) -> None:
    """Gives a module a parameter of its own, where other modules share it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found = getattr(module, leaf)
    if isinstance(found, nn.Parameter) and is_shared(model, name):
        setattr(module, leaf, nn.Parameter(found.detach().clone(), found.requires_grad))


def stored_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight of a module as it is stored; None where it has no weight.

    Of a packed projection it is that of its own rows, of a quantised layer that of the dequantised weight, of stacked
    experts (E, O, I).
    """
    if isinstance(module, PackedProjection | ExpertProjection):
        return tuple(module.matrix.shape)
    if isinstance(module, DoRAQuantized) or is_quantized(module):
        return int(module.out_features), int(module.in_features)  # pyright: ignore[reportArgumentType]
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight of a module with O first, (O, I) or (O, I / groups, *K); None where it has no weight.

    Of stacked experts it is (E, O, I).
    """
    shape = stored_shape(module)
    kind = type(module) if isinstance(module, AdaptedLayer) else adapted_class(module)
    return shape[::-1] if shape and kind and issubclass(kind, TransposedLayer) else shape


def _misfit(state: LayerState, module: nn.Module) -> str:
    """The reason why the tensors do not fit a module; empty when they do."""
    shape, stored = weight_shape(module), stored_shape(module)
    if shape is None or stored is None:
        return f"the model has a {type(module).__name__}"
    first = shape[:1] if isinstance(module, ExpertProjection) else ()
    out_features, *inner = shape[len(first) :]
    rank = state.spec.rank
    expected = {
        "lora_A": (*first, rank, *inner),
        "lora_B": (*first, out_features, rank),
        "magnitude": (*first, out_features),
        "weight": stored,
    }
    for name, tensor in state.tensors.items():
        if tuple(tensor.shape) != expected[name]:
            return f"its {name} has shape {tuple(tensor.shape)} instead of {expected[name]}"
    return ""


def _check_same_layers(
    layers: Mapping[str, LayerState], adapted: Mapping[str, AdaptedLayer], component: str, source: Path
) -> None:
    for path in adapted:
        if path not in layers:
            raise ValueError(
                f"{source} does not adapt {joined(component, path)}, which is adapted in this model: adapt only what "
                "the file has (adapter.parts), or call remove first"
            )
    for path, state in layers.items():
        if path not in adapted:
            raise ValueError(
                f"{source} adapts {joined(component, path)}, which is not adapted in this model: call remove first"
            )
        needed, found = (_kind(spec) for spec in (adapted[path].adaptation.spec, state.spec))
        if needed != found:
            raise ValueError(
                f"{source} holds {found} for {joined(component, path)}, but the model is adapted with {needed}: "
                f"adapt it with {found}, or call remove first"
            )


def _kind(spec: DoRASpec) -> str:
    return f"{spec.method} of rank {spec.rank}" if _has_rank(spec) else spec.method

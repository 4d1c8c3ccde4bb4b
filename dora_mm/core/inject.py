"""Injects adapters into a model, and works on all adapters of a model at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.kinds import adapt_layer, adapted_class, not_adaptable, restore_layer
from dora_mm.core.spec import DoRASpec
from dora_mm.core.strength import Strength, strengths_of
from dora_mm.core.targets import TargetMap, match_modules
from dora_mm.core.wrappers.attention import set_fast_paths, why_not_separable
from dora_mm.core.wrappers.quantized import DoRAQuantized
from dora_mm.core.wrappers.separation import inside, projections_of, restore, separate, with_projections
from dora_mm.core.wrappers.sharded import check_not_sharded, reshard


@dataclass(frozen=True)
class AdaptedModule:
    """An adapted module of a report.

    Attributes:
        path: The path of the module in the model.
        part: The part of the target map that selected it, empty where a pattern did; of a loaded file, the component.
        kind: The name of its adapted class.
        shape: The shape of its weight with output rows first.
        num_parameters: How many parameters are trained in it.
    """

    path: str
    part: str
    kind: str
    shape: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True)
class InjectReport:
    """The modules that were adapted. `str()` is a table with one line per part, name and shape.

    Attributes:
        modules: The adapted modules, in the order in which they were adapted.
        num_trainable_others: The number of parameters outside of the adapters that require gradients, which `inject`
            leaves as they are: an adapter file has them only as `extra_parameters`.
    """

    modules: tuple[AdaptedModule, ...]
    num_trainable_others: int = 0

    @property
    def num_modules(self) -> int:
        """The number of adapted modules."""
        return len(self.modules)

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters in them."""
        return sum(m.num_parameters for m in self.modules)

    def __str__(self) -> str:
        rows: Counter[tuple[str, ...]] = Counter()
        parameters: Counter[tuple[str, ...]] = Counter()
        for m in self.modules:
            name = m.path.split(".")[-1]
            if name.isdigit():
                name = ".".join(m.path.split(".")[-2:])
            key = (m.part, name, m.kind, " x ".join(map(str, m.shape)))
            rows[key] += 1
            parameters[key] += m.num_parameters
        table: list[tuple[str, ...]] = [("part", "module", "class", "weight", "count", "parameters")]
        table += [(*key, str(count), f"{parameters[key]:,}") for key, count in rows.items()]
        if not any(m.part for m in self.modules):
            table = [row[1:] for row in table]
        texts = len(table[0]) - 2
        table += [("all", *[""] * (texts - 1), str(self.num_modules), f"{self.num_parameters:,}")]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        if self.num_trainable_others:
            lines.append(
                f"{self.num_trainable_others} other parameters still require gradients; "
                "model.requires_grad_(False) before inject freezes them"
            )
        return "\n".join(lines)


def inject(
    model: nn.Module,
    targets: TargetMap | Sequence[str],
    spec: DoRASpec,
    *,
    forward: Forward = TORCH,
    seed: int = 0,
) -> InjectReport:
    """Adapts every module that `targets` selects, in place, and freezes the adapted weights.

    Every other `requires_grad` is left as it is.

    Args:
        model: The model.
        targets: A target map, all parts of which are adapted, or a list of patterns (see `TargetMap`).
        spec: The settings of the adapters.
        forward: The implementation of the layer (see `backend.select`).
        seed: A is drawn from it and the path of the module.

    Raises:
        ValueError: A pattern or a module does not fit; the message names it. The model is then unchanged.
    """
    if isinstance(targets, str) or (not isinstance(targets, TargetMap) and not targets):
        raise ValueError(f"targets must be a TargetMap or a list of patterns, at least one, not {targets!r}")
    check_not_sharded(model)
    if not isinstance(targets, TargetMap):
        targets = TargetMap("", {"": tuple(targets)})
    taken = match_modules(model, targets)
    return inject_paths(model, {path: (part, spec) for path, part in taken.items()}, forward=forward, seed=seed)


def inject_paths(
    model: nn.Module,
    wanted: Mapping[str, tuple[str, DoRASpec]],
    *,
    forward: Forward = TORCH,
    seed: int = 0,
    name: str = "default",
) -> InjectReport:
    """Adapts the given modules, in place.

    Args:
        model: The model.
        wanted: The part (for the report) and the spec of each module, by its path.
        forward: The implementation of the layer (see `backend.select`).
        seed: A is drawn from it and the path of the module.
        name: The name of the adapter.

    Raises:
        ValueError: A module cannot be adapted, or not with its spec. The model is then unchanged.
    """
    if wanted:
        check_not_sharded(model)
    modules = with_projections(dict(model.named_modules()))
    for path, (_, spec) in wanted.items():
        _check_adaptable(modules, path, spec)
    trained = _trainable_before(modules)
    done: list[AdaptedLayer] = []
    try:
        for path, (_, spec) in wanted.items():
            above = path.rpartition(".")[0]
            if names := projections_of(modules[above]):
                separate(modules[above], {name: modules[inside(above, name)] for name in names})
            before = trained.get(id(modules[path].weight))
            settings = {"path": path, "forward": forward, "seed": seed, "name": name, "trainable_before": before}
            done.append(adapt_layer(modules[path], spec, **settings))
    except BaseException:  # no memory, say
        for layer in done:
            restore_layer(layer)
        restore(model)
        raise
    set_fast_paths(model)
    own = {id(parameter) for layer in adapted_layers(model).values() for parameter in layer.adapter_tensors().values()}
    others = sum(p.requires_grad for p in model.parameters() if id(p) not in own)
    return InjectReport(tuple(describe(layer, wanted[layer.adaptation.path][0]) for layer in done), others)


def _trainable_before(modules: Mapping[str, nn.Module]) -> dict[int, bool]:
    """Whether each weight is trained in the base model, by id: adapting a layer freezes one that others may share."""
    trained = {id(p): p.requires_grad for module in modules.values() for p in module.parameters(recurse=False)}
    layers = [module for module in modules.values() if isinstance(module, AdaptedLayer)]
    return trained | {id(layer.weight): layer.adaptation.trainable_before for layer in layers}


def describe(layer: AdaptedLayer, part: str) -> AdaptedModule:
    """The entry of an adapted layer in the report."""
    num_parameters = sum(p.numel() for p in layer.adapter_tensors().values())
    return AdaptedModule(
        layer.adaptation.path, part, type(layer).__name__, tuple(layer.full_matrix().shape), num_parameters
    )


def _check_adaptable(modules: dict[str, nn.Module], path: str, spec: DoRASpec) -> None:
    layer = modules.get(path)
    if layer is None:
        raise ValueError(f"the model has no module {path}")
    if isinstance(layer, AdaptedLayer):
        raise ValueError(f"{path} is adapted already: call remove first")
    kind = adapted_class(layer, spec.method)
    if kind is None:
        raise ValueError(f"{path} is {not_adaptable(layer)}")
    if why := why_not_separable(modules.get(path.rpartition(".")[0])):
        raise ValueError(f"{path} is inside an attention that would not call its adapter: {why}")
    if why := kind.why_not(layer, path, spec):
        raise ValueError(why)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Returns the adapted layers by path.

    Raises:
        ValueError: There are none.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer: inject or load an adapter first")
    return layers


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that the adapters of a model train.

    Args:
        model: The adapted model.

    Returns:
        The parameters by name: `<path>.lora_A` (R, I), `<path>.lora_B` (O, R) and `<path>.magnitude` (O,),
        depending on the method, or `<path>.weight` for method `full`. Stacked adapters and assistants are not trained.

    Raises:
        ValueError: The model has no adapted layer.
    """
    return {
        f"{path}.{name}": parameter
        for path, layer in adapted_layers(model).items()
        if not layer.adaptation.assists
        for name, parameter in layer.adapter_tensors().items()
    }


def remove(model: nn.Module) -> None:
    """Removes all adapters in place. The layers get their class, weight and `requires_grad` from before `inject` back.

    Layers merged with `keep_base=False` keep the merged weight, and weights trained with method `full` stay as trained.

    Args:
        model: The adapted model.

    Raises:
        ValueError: The model has no adapted layer, or a parametrization on one. It is then unchanged.
    """
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.check_unpacked()
    for layer in layers:
        restore_layer(layer)
    restore(model)
    set_fast_paths(model)


def set_strength(
    model: nn.Module, strength: Strength, *, name: str | None = None, short: Mapping[str, str] | None = None
) -> None:
    """Sets the strength t of the adapters: the weight of a layer is then W0 + t (W' - W0).

    Args:
        model: The adapted model.
        strength: t, any finite number: 0 is exactly the base model, 1 the trained one. Or numbers by the first pieces
            of the modules' paths; modules that none of them names get 1. See `core.strength.strengths_of`.
        name: The adapter whose strength is set, where several are loaded; None sets the strength of all.
        short: See `core.strength.strengths_of`.

    Raises:
        ValueError: The strength is not a finite number, or names a part without adapted modules; or the model has no
            adapted layer or no adapter of that name, is merged, or was trained with method `full`, which has no
            strength. It is then unchanged.
    """
    by_path = adapted_layers(model)
    strengths, layers = strengths_of(strength, by_path, short), by_path.values()
    names = {n for layer in layers for n in (layer.adaptation.name, *layer.adaptation.stacked)}
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}, only {', '.join(sorted(names))}")
    for layer in layers:
        layer.check_has_strength()
        layer.check_not_merged()
    for path, layer in by_path.items():
        layer.set_strength(strengths[path], name)


def set_assistant_strength(model: nn.Module, strength: float) -> None:
    """Sets the strength of the assistant of a model, see `Adaptation`; without one nothing changes.

    Args:
        model: The model.
        strength: As in `set_strength`.
    """
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            state = module.adaptation
            for name in [state.name] * state.assists + [name for name, s in state.stacked.items() if s.assists]:
                module.set_strength(strength, name)


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        num_modules: The number of merged modules.
        surviving_share: The fraction of the update that the weights in half precision contain; 1 where there are none.
    """

    num_modules: int
    surviving_share: float


def merge(model: nn.Module, *, keep_base: bool = True) -> MergeReport:
    """Replaces each adapted weight by W(t): the model then costs what the base model does.

    Half-precision weights are rounded stochastically, from a fixed seed. Each weight becomes a new Parameter, so that
    other modules that share the old one, and the backward passes of earlier forward passes, keep that. While merged, a
    state dict of the model has the merged weights and no adapters. With FSDP2, every process calls this.

    Args:
        model: The adapted model.
        keep_base: Whether the base weights are kept in memory, so that `unmerge` can restore them bit for bit.

    Returns:
        The number of merged modules, and the fraction of the update that survived rounding.

    Raises:
        ValueError: The model has no adapted layer, is merged already, or has a weight that cannot be replaced (it is
            quantised or parametrized). The model is then unchanged.
    """
    reshard(model)
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.check_can_merge()
    stored = update = 0.0
    for layer in layers.values():
        part_stored, part_update = layer.merge(keep_base=keep_base)
        stored, update = stored + part_stored, update + part_update
    return MergeReport(len(layers), stored / update if update else 1.0)


def unmerge(model: nn.Module) -> None:
    """Restores every base weight bit for bit, after `merge`.

    Args:
        model: The adapted model. Layers that are not merged are left as they are.

    Raises:
        ValueError: The model has no adapted layer, or was merged with `keep_base=False`. It is then unchanged.
    """
    reshard(model)
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.check_can_unmerge()
    for layer in layers.values():
        layer.unmerge()


@contextmanager
def fixed_parameters(model: nn.Module, *, num_passes: float = math.inf, base_only: bool = False) -> Iterator[None]:
    """A context in which base weights and adapters do not change, so that what depends only on them is computed once.

    The caller guarantees this: writing to a parameter inside is not detected. Backward passes of checkpointed forward
    passes belong inside, since they repeat those. A change through the interface of the
    layer (strength, merge, load_state_dict, `.to`) is detected, and ends the guarantee for that layer.

    Args:
        model: The model. Its layers need not be adapted.
        num_passes: How many forward passes are made inside, repetitions of checkpointed ones included. A layer with few
            tokens builds W(t) only where it pays for that many.
        base_only: Whether only the base weights are constant, as during training. The adapters may then change.

    Yields:
        None.
    """
    states = [m.adaptation for m in model.modules() if isinstance(m, AdaptedLayer)]
    bases = [state for state in states if state.caches is None]
    for state in bases:
        state.caches = {}
    opened = [state for state in states if state.num_passes is None and not base_only]
    for state in opened:
        state.num_passes = num_passes
    try:
        yield
    finally:
        for state in opened:
            state.end_passes()
        for state in bases:
            state.caches = None


@contextmanager
def merged_adapters(networks: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which the adapters of networks are merged, so that a pass costs what it does without them.

    Quantised weights cannot be merged: theirs are computed once.

    Args:
        networks: Networks, adapted or not.
    """
    with ExitStack() as stack:
        for network in networks:
            active = [m for m in network.modules() if isinstance(m, AdaptedLayer) and not m.is_base()]
            if any(isinstance(layer, DoRAQuantized) for layer in active):
                stack.enter_context(fixed_parameters(network))
            elif active:
                merge(network)
                stack.callback(unmerge, network)
        yield

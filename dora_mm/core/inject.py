"""Put adapters into a model, and do things to all of them at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from dora_mm.core.adapted import AdaptedLayer, DoRASpec
from dora_mm.core.attention import (
    PROJECTIONS,
    PackedAttention,
    PackedProjection,
    inside,
    put_together,
    take_apart,
    why_not_apart,
    with_projections,
)
from dora_mm.core.fast_path import set_fast_paths
from dora_mm.core.fused import TORCH, Forward
from dora_mm.core.layer import adapt_layer, restore_layer
from dora_mm.core.quantized import is_quantized, why_not_quantized
from dora_mm.core.targets import NOT_ADAPTABLE, TargetMap, adaptable, match_modules


@dataclass(frozen=True)
class AdaptedModule:
    path: str
    part: str
    kind: str
    shape: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True)
class InjectReport:
    """What was adapted. `str()` is a table: one line per part, name and shape."""

    modules: tuple[AdaptedModule, ...]

    @property
    def num_modules(self) -> int:
        return len(self.modules)

    @property
    def num_parameters(self) -> int:
        return sum(m.num_parameters for m in self.modules)

    def __str__(self) -> str:
        rows = Counter()
        parameters = Counter()
        for m in self.modules:
            name = m.path.split(".")[-1]
            if name.isdigit():
                name = ".".join(m.path.split(".")[-2:])
            key = (m.part, name, m.kind, " x ".join(map(str, m.shape)))
            rows[key] += 1
            parameters[key] += m.num_parameters
        table = [("part", "module", "class", "weight", "count", "parameters")]
        table += [(*key, str(count), f"{parameters[key]:,}") for key, count in rows.items()]
        table += [("all", "", "", "", str(self.num_modules), f"{self.num_parameters:,}")]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        return "\n".join(
            "  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        )


def inject(
    model: nn.Module,
    targets: TargetMap | Sequence[str],
    spec: DoRASpec,
    *,
    forward: Forward = TORCH,
    seed: int = 0,
) -> InjectReport:
    """Adapts every module that `targets` takes, in place, and freezes the adapted weights.

    `targets` is a map or a list of patterns, `forward` the implementation (see `backend.select`). Every other
    `requires_grad` is left as it is. Nothing is changed when anything is wrong: ValueError names the pattern or module.
    """
    if not isinstance(targets, TargetMap):
        targets = TargetMap("given", {"given": tuple(targets)})
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
    """Adapts exactly these modules: path -> (part, spec). Nothing is changed when one of them cannot be adapted."""
    modules = with_projections(dict(model.named_modules()))
    for path, (_, spec) in wanted.items():
        _check_adaptable(modules, path, spec)
    report = []
    for path, (part, spec) in wanted.items():
        above = path.rpartition(".")[0]
        if type(attention := modules.get(above)) is nn.MultiheadAttention:
            take_apart(attention, {name: modules[inside(above, name)] for name in PROJECTIONS})
        if isinstance(attention, PackedAttention) and isinstance(modules[path], PackedProjection):
            attention.remember_trainable()
        layer = adapt_layer(modules[path], spec, path=path, function=forward, seed=seed, name=name)
        report.append(describe(layer, part))
    set_fast_paths(model)
    return InjectReport(tuple(report))


def describe(layer: AdaptedLayer, part: str) -> AdaptedModule:
    num_parameters = sum(p.numel() for p in layer.adapter_tensors().values())
    return AdaptedModule(layer.path, part, type(layer).__name__, tuple(layer.matrix.shape), num_parameters)


def _check_adaptable(modules: dict[str, nn.Module], path: str, spec: DoRASpec) -> None:
    layer = modules.get(path)
    if layer is None:
        raise ValueError(f"the model has no module {path}")
    if isinstance(layer, AdaptedLayer):
        raise ValueError(f"{path} is adapted already: call remove first")
    if not adaptable(layer):
        raise ValueError(f"{path} is a {type(layer).__name__}, {NOT_ADAPTABLE}")
    attention = modules.get(path.rpartition(".")[0])
    if isinstance(attention, nn.MultiheadAttention):
        if why := why_not_apart(attention):
            raise ValueError(f"{path} is inside a MultiheadAttention {why}, which reads weights and calls no adapter")
        if spec.method == "full" and isinstance(layer, PackedProjection):
            raise ValueError(f"{path} is a part of in_proj_weight, which method full would train as a whole")
    if isinstance(layer, nn.Embedding):
        if spec.dropout:
            raise ValueError(f"{path} is an Embedding, whose inputs are no numbers to drop: set dropout 0")
        if layer.max_norm is not None:
            raise ValueError(f"{path} has max_norm {layer.max_norm:g}, which changes its weight in every pass")
    if "forward" in vars(layer):
        raise ValueError(f"{path} has a forward function of its own (a hook of accelerate?): inject before adding it")
    if is_quantized(layer):
        if why := why_not_quantized(layer):
            raise ValueError(f"{path} {why}")
        if spec.method == "full":
            raise ValueError(f"{path} is quantised, and method full trains weights: load the model in float32")
    if spec.method == "full" and layer.get_parameter("weight").dtype.itemsize < 4:
        raise ValueError(f"method full trains {path} itself, and half precision loses small steps: load it in float32")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by path; ValueError when there are none."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer: inject or load an adapter first")
    return layers


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapters train, by name: `<path>.lora_A`, `.lora_B`, `.magnitude`, or `.weight` for method full."""
    return {
        f"{path}.{name}": parameter
        for path, layer in adapted_layers(model).items()
        for name, parameter in layer.adapter_tensors().items()
    }


def remove(model: nn.Module) -> None:
    """Takes all adapters off. Layers merged with `keep_base=False` keep the merged weight, others their base."""
    for layer in adapted_layers(model).values():
        restore_layer(layer)
    for module in list(model.modules()):
        if isinstance(module, PackedAttention):
            put_together(module)
    set_fast_paths(model)


def set_strength(model: nn.Module, strength: float, *, name: str | None = None) -> None:
    """W0 + strength (W' - W0) in every adapted layer: 0 is the base layer itself, 1 the trained one.

    `name` chooses one of several adapters (see `io.load`); without it the strength is that of all.
    """
    layers = adapted_layers(model).values()
    names = {n for layer in layers for n in (layer.name, *layer.stacked)}
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}, only {', '.join(sorted(names))}")
    for layer in layers:
        layer.set_strength(strength, name)


@dataclass(frozen=True)
class MergeReport:
    """surviving_share: how much of the update is in the stored weights, 1 for all of it."""

    num_modules: int
    surviving_share: float


def merge(model: nn.Module, *, keep_base: bool = True) -> MergeReport:
    """Puts W(t) in the place of each adapted weight: the model then costs what the bare one does.

    Half-precision weights are rounded stochastically from a fixed generator. `keep_base` stashes the weights, so that
    `unmerge` restores every bit. A weight that another module uses too is cloned, so that only this layer changes.
    """
    layers = adapted_layers(model)
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for layer in layers.values():
        layer.check_can_merge()
        layer.check_can_replace_weight(shared=users[id(layer.weight)] > 1)
    stored = update = 0.0
    for layer in layers.values():
        part_stored, part_update = layer.merge(keep_base=keep_base, shared=users[id(layer.weight)] > 1)
        stored, update = stored + part_stored, update + part_update
    return MergeReport(len(layers), stored / update if update else 1.0)


def unmerge(model: nn.Module) -> None:
    """Puts every base weight back bit for bit; ValueError after `merge(keep_base=False)`."""
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.check_can_unmerge()
    for layer in layers.values():
        layer.unmerge()


@contextmanager
def fixed_parameters(model: nn.Module, *, num_passes: float = math.inf, base_only: bool = False) -> Iterator[None]:
    """Promises that base weights and adapters do not change inside: what depends on them alone is computed once.

    A change through the module's own interface (strength, merge, load_state_dict, `.to`) ends the promise for that
    layer. Nothing else is watched: a write to a parameter inside is not seen.

    num_passes: how many passes are made inside. A layer with few tokens builds W(t) only where that many pay for it.
    base_only: the promise holds for the base weights alone, as it does during a whole training.
    """
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    bases = [layer for layer in layers if not layer.base_fixed]
    opened = [layer for layer in layers if layer.kept is None and not base_only]
    for layer in bases:
        layer.base_fixed = True
    for layer in opened:
        layer.kept, layer.num_passes = {}, num_passes
    try:
        yield
    finally:
        for layer in opened:
            layer.end_fixed()
        for layer in bases:
            layer.end_fixed(base=True)

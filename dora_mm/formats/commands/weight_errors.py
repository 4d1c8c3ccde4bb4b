"""How far the weights that tools compute are from the weight that an adapter means, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.core.functional import adapter_dtype
from dora_mm.formats.algebra.exact import gain_of, new_rows
from dora_mm.formats.algebra.row_blocks import row_blocks, rows_of
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import products, tool_of
from dora_mm.formats.tools.formulas import Formula, Update, added, scaling
from dora_mm.formats.tools.parts import Parts, rows_of_parts, without_magnitude

BOUND = 1e-5  # of the update; fp32 adds what it loses beside a large W0
_ROUNDING = 8 * torch.finfo(torch.float32).eps
_FULL = slice(None)


class ToolLoad(NamedTuple):
    """The tensors that a tool loads of a module: the tool's name, the parts by role, and the strength."""

    tool: str
    parts: Parts
    strength: float = 1.0


class WeightErrors(NamedTuple):
    """The errors of the weights that tools compute for one module.

    Attributes:
        size: ||W' - W0||.
        norm: ||W0||.
        errors: For each load ||W_tool(t) - W(t)||: infinite where the tool raises an error, NaN where its result is not
            finite.
    """

    size: float
    norm: float
    errors: list[float]

    def relative(self, error: float) -> float:
        """An error relative to W' - W0; as it is where that is 0, and NaN where that is not finite."""
        return error / (self.size or 1) if math.isfinite(self.size) else math.nan

    def bound(self, relative: float = BOUND) -> float:
        """The relative error of W' - W0 that rounding in fp32 explains; the absolute one where W' is W0."""
        return relative + _ROUNDING * self.norm / (self.size or 1)


def weight_errors(
    loads: Sequence[ToolLoad], W0: Tensor, layer: LayerState, strength: float = 1.0, change: Tensor | None = None
) -> WeightErrors:
    """Computes what tools make of a module. What they have in common is computed once.

    Args:
        loads: What each of them loads.
        W0: The base weight, in any dtype: it is compared in fp32, or float64 for float64.
        layer: The adapter that is meant.
        strength: The strength of it that is meant.
        change: What gets W(t) - W0, in the shape of W0 and any dtype, before the tools read it.
    """
    if layer.num_experts is not None:
        return _of_experts(loads, W0, layer, strength, change)
    steps = [_step_of(load) for load in loads]
    by_rows = [layer.axis == "out" and _is_by_rows(load, len(W0)) for load in loads]
    size, norm, errors = 0.0, 0.0, [0.0] * len(loads)
    for split, blocks in ((False, [_FULL]), (True, row_blocks(W0))):
        chosen = [number for number, found in enumerate(by_rows) if found == split]
        if chosen or (not loads and split == (layer.axis == "out")):
            some = [(steps[number], loads[number].strength) for number in chosen]
            size, norm, found = _in_blocks(some, blocks, W0, layer, strength, change)
            for number, error in zip(chosen, found, strict=True):
                errors[number] = error
    return WeightErrors(size, norm, errors)


def _of_experts(
    loads: Sequence[ToolLoad], W0: Tensor, layer: LayerState, strength: float, change: Tensor | None
) -> WeightErrors:
    """The same of stacked experts, over all of them."""
    found = [
        weight_errors([_of_expert(load, index) for load in loads], W0[index], expert, strength, _at(change, index))
        for index, expert in enumerate(layer.of_experts())
    ]
    errors = zip(*(each.errors for each in found), strict=True)
    sizes, norms = (math.hypot(*values) for values in zip(*((each.size, each.norm) for each in found), strict=True))
    return WeightErrors(sizes, norms, [math.hypot(*of_load) for of_load in errors])


def _of_expert(load: ToolLoad, index: int) -> ToolLoad:
    """What a tool that reads stacked experts loads of one; another tool takes the same tensors for a single weight."""
    if "experts" not in load.parts:
        return load
    own = {role: t[index] if role in ("A", "B", "m") else t for role, t in load.parts.items() if role != "experts"}
    return load._replace(parts=own)


def _at(change: Tensor | None, index: int) -> Tensor | None:
    return None if change is None else change[index]


def is_read(parts: Mapping[str, object]) -> bool:
    """Whether the tensors that a tool reads of a module make up an adapter; else it ignores them."""
    return {"A", "B"} <= parts.keys() or bool(parts.keys() & {"diff", "weight"} or products.method_of(parts.keys()))


def _is_by_rows(load: ToolLoad, num_rows: int) -> bool:
    return not is_read(load.parts) or tool_of(load.tool).computes.is_by_rows(load.parts, num_rows)


class _Step(NamedTuple):
    """The computation of a tool on the tensors of a module.

    Attributes:
        formula: Its formula.
        parts: The tensors without the magnitude.
        m: The magnitude.
        update: The same for the same `parts`.
        key: The same for steps that compute the same.
    """

    formula: Formula
    parts: Parts
    m: Tensor | None
    update: Hashable
    key: Hashable


def _step_of(load: ToolLoad) -> _Step | None:
    """The computation of a tool; None where it reads nothing of the module."""
    return _step(tool_of(load.tool).computes.formula(load.parts), load.parts) if is_read(load.parts) else None


def _step(formula: Formula, parts: Parts) -> _Step:
    update, m = without_magnitude(parts), parts.get("m")
    key = hash((scaling(update), _memory({role: tensor for role, tensor in update.items() if role != "alpha"})))
    return _Step(formula, update, m, key, hash((formula, key, None if m is None else _memory({"m": m}))))


def _memory(parts: Parts) -> Hashable:
    """The same for tensors with the same values in the same memory."""
    return frozenset((role, t.data_ptr(), t.dtype, t.shape, t.stride()) for role, t in parts.items())


def _in_blocks(
    loads: Sequence[tuple[_Step | None, float]],
    blocks: Iterable[slice],
    W0: Tensor,
    layer: LayerState,
    strength: float,
    change: Tensor | None,
) -> tuple[float, float, list[float]]:
    """||W' - W0||, ||W0|| and the errors of what is done at a strength."""
    keys = [(step and step.key, t) for step, t in loads]
    unlike = dict(zip(keys, loads, strict=True))
    own = None
    if "lora_A" in layer.tensors and (layer.spec.scaling, layer.norm, strength) == (1, "updated", 1):
        step = _step(added, {"A": layer.tensors["lora_A"], "B": layer.tensors["lora_B"]})
        own = step if any(other and step.update == other.update for other, _ in loads) else None

    def of_rows(rows: slice) -> list[float]:
        """The same of some rows, for loads that are unlike; its tensors make room for those of the next rows."""
        base = W0[rows].to(adapter_dtype(W0.dtype))
        block = _Block(rows, base, layer if rows == _FULL else rows_of(layer, rows), strength, own)
        sizes = block.sizes(None if change is None else change[rows])
        return [*sizes, *(block.error(step, t) for step, t in unlike.values())]

    size, norm, *errors = (math.hypot(*values) for values in zip(*map(of_rows, blocks), strict=True))
    by_key = dict(zip(unlike, errors, strict=True))
    return size, norm, [by_key[key] for key in keys]


class _Block:
    """Some rows of a weight, and what several tools compute of them, which is computed once.

    Args:
        rows: Which rows.
        W0: Those of the base weight.
        layer: Those of the adapter that is meant.
        strength: Its strength.
        own: Its low rank, where W' is a gain times W0 + B A, and tools read it, too.
    """

    def __init__(self, rows: slice, W0: Tensor, layer: LayerState, strength: float, own: _Step | None):
        self.rows, self.W0 = rows, W0
        self._updates: dict[Hashable, Update] = {}
        self._weights: dict[Hashable, Tensor] = {}
        self._errors: dict[Hashable, float] = {}
        if own is None:
            self._W = new_rows(layer, W0, strength)
        else:
            update = self._update(own)
            self._W = update.scaled(gain_of(layer, update.V)) if "magnitude" in layer.tensors else update.V

    def sizes(self, change: Tensor | None) -> tuple[float, float]:
        """||W(t) - W0||, which is written into `change`, and ||W0||."""
        D = self._W - self.W0
        if change is not None:
            change.copy_(D)
        return _norm(D), _norm(self.W0)

    def error(self, step: _Step | None, strength: float) -> float:
        """||W_tool(t) - W(t)||: infinite where the tool raises an error, NaN where its result is not finite."""
        try:
            found = self.W0 if step is None else self._weight(step, strength)
        except (RuntimeError, IndexError):  # shapes do not fit, as in the tool
            return math.inf
        if found.shape != self.W0.shape:
            return math.inf
        key = (id(found), strength)
        if key not in self._errors:
            W = self._W if strength == 1 else torch.add(self.W0, self._W - self.W0, alpha=strength)
            error = 0.0 if found is W else _norm(found - W)
            self._errors[key] = error if math.isfinite(error) else math.nan
        return self._errors[key]

    def _weight(self, step: _Step, strength: float) -> Tensor:
        key = (step.key, strength)
        if key not in self._weights:
            m = step.m if step.m is None else step.m[self.rows] if self.rows != _FULL else step.m
            self._weights[key] = step.formula(self._update(step), m, strength)
        return self._weights[key]

    def _update(self, step: _Step) -> Update:
        if step.update not in self._updates:
            parts = step.parts if self.rows == _FULL else rows_of_parts(step.parts, self.rows)
            self._updates[step.update] = Update(parts, self.W0)
        return self._updates[step.update]


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight))

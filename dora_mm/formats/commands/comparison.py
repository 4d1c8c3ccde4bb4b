"""How far the weights that tools compute are from the weight that an adapter means, some rows at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.algebra.exact import new_rows
from dora_mm.formats.algebra.rows import row_blocks, rows_of
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import TOOLS, products
from dora_mm.formats.tools.formulas import Update
from dora_mm.formats.tools.parts import Parts, rows_of_parts

BOUND = 1e-5  # of the update; fp32 adds what it loses beside a large W0
_ROUNDING = 8 * torch.finfo(torch.float32).eps
_WHOLE = slice(None)


class ToolLoad(NamedTuple):
    """What a tool loads of a module: its key in `TOOLS`, the parts of one file after the other, and the strength."""

    tool: str
    files: Sequence[Parts]
    strength: float = 1.0

    @property
    def kind(self) -> Hashable:
        """The same for loads of which the same formulas compute the same weight."""
        formulas = tuple(TOOLS[self.tool].formula(parts) for parts in self.files)
        return formulas, tuple(map(_identity, self.files)), self.strength


class Comparison(NamedTuple):
    """What tools compute for one module.

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
        """An error relative to W' - W0; as it is where that is 0."""
        return error / (self.size or 1)

    def bound(self, relative: float = BOUND) -> float:
        """The relative error of W' - W0 that rounding in fp32 explains; the absolute one where W' is W0."""
        return relative + _ROUNDING * self.norm / (self.size or 1)


def compared(loads: Sequence[ToolLoad], W0: Tensor, layer: LayerState, strength: float = 1.0) -> Comparison:
    """Computes what tools make of a module. Those with one formula for the same tensors do it once.

    Args:
        loads: What each of them loads.
        W0: The base weight in fp32.
        layer: The adapter that is meant.
        strength: The strength of it that is meant.
    """
    kinds = [load.kind for load in loads]
    distinct = dict(zip(kinds, loads, strict=True))
    in_blocks = {kind: load for kind, load in distinct.items() if layer.axis == "out" and _is_by_rows(load, len(W0))}
    whole = {kind: load for kind, load in distinct.items() if kind not in in_blocks}
    found: dict[Hashable, float] = {}
    size = norm = 0.0
    for some, blocks in ((whole, [_WHOLE]), (in_blocks, row_blocks(W0))):
        if some or not distinct:
            size, norm, errors = _in_blocks(some, blocks, W0, layer, strength)
            found |= errors
    return Comparison(size, norm, [found[kind] for kind in kinds])


def is_read(parts: Parts) -> bool:
    """Whether the tensors that a tool reads of a module make up an adapter; else it ignores them."""
    return {"A", "B"} <= parts.keys() or bool(parts.keys() & {"diff", "weight"} or products.method_of(parts))


def _identity(parts: Parts) -> Hashable:
    return frozenset((role, id(tensor)) for role, tensor in parts.items())


def _is_by_rows(load: ToolLoad, num_rows: int) -> bool:
    return all(TOOLS[load.tool].is_by_rows(parts, num_rows) for parts in load.files if is_read(parts))


def _in_blocks(
    loads: Mapping[Hashable, ToolLoad], blocks: Iterable[slice], W0: Tensor, layer: LayerState, strength: float
) -> tuple[float, float, dict[Hashable, float]]:
    """||W' - W0||, ||W0|| and the errors."""
    sizes, norms, errors = [], [], defaultdict(list)
    for rows in blocks:
        base = W0[rows]
        W = new_rows(layer if rows == _WHOLE else rows_of(layer, rows), base, strength)
        change = W - base
        sizes.append(_norm(change))
        norms.append(_norm(base))
        updates: dict[Hashable, Update] = {}
        for kind, load in loads.items():
            meant = W if load.strength == 1 else torch.add(base, change, alpha=load.strength)
            errors[kind].append(_error(load, rows, base, meant, updates))
    return math.hypot(*sizes), math.hypot(*norms), {kind: math.hypot(*found) for kind, found in errors.items()}


def _error(load: ToolLoad, rows: slice, base: Tensor, meant: Tensor, updates: dict[Hashable, Update]) -> float:
    """||W_tool(t) - W(t)|| over some rows.

    Args:
        load: What the tool loads.
        rows: The rows.
        base: Those of W0.
        meant: Those of W(t).
        updates: What other loads have computed of the same rows, to which this one's are added.
    """
    found = base
    try:
        for parts in filter(is_read, load.files):
            key = _identity(parts)
            if key not in updates:
                updates[key] = Update(rows_of_parts(parts, rows), found)
            found = TOOLS[load.tool].formula(parts)(updates[key].over(found), load.strength)
    except (RuntimeError, IndexError):  # shapes do not fit, as in the tool
        return math.inf
    if found.shape != base.shape:
        return math.inf
    error = _norm(found - meant)
    return error if math.isfinite(error) else math.nan


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight))

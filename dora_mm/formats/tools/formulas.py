"""The weights that tools compute from the tensors of a module: the formulas of several tools, and the record of one.

    V = W0 + s B A,    W' = V m / n,    W(t) = W0 + t (W' - W0)

where n is the norm of V or of W0. All is plain torch, in the dtype of W0; it broadcasts and raises where the tools do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.tools import products
from dora_mm.formats.tools.parts import Parts, down, have_rows, of_rows, rank_of, without_magnitude

EPS = torch.finfo(torch.float32).eps


class Update:
    """The update of a weight, or of some rows of it, by the tensors of a module; each value is computed once.

    Attributes:
        parts: The tensors by role, without the magnitude.
        W0: The weight.
    """

    def __init__(self, parts: Parts, W0: Tensor):
        self.parts, self.W0 = parts, W0
        self._scaled: list[tuple[Tensor, Tensor]] = []

    @cached_property
    def scaling(self) -> float:
        """s, alpha / rank; 1 without alpha."""
        return scaling(self.parts)

    def BA(self) -> Tensor:
        """B A in the shape and dtype of W0, without alpha; or the change that stands for it. A new tensor."""
        if products.method_of(self.parts):
            return products.product(self.parts, self.W0)
        A, B = down(self.parts).to(self.W0.dtype), self.parts["B"].to(self.W0.dtype)
        if "experts" in self.parts:
            return (B @ A).view(self.W0.shape)
        return (B.flatten(1) @ A.flatten(1)).view(self.W0.shape)

    @cached_property
    def V(self) -> Tensor:
        """W0 + s B A."""
        if "B" in self.parts and not self.parts["B"].any():
            return self.W0
        return self.plus(self.scaling)

    def plus(self, factor: float) -> Tensor:
        """W0 and so much of B A, rounded in between as in the tools; in the memory of B A."""
        BA = self.BA()
        return (BA if factor == 1 else BA.mul_(factor)).add_(self.W0)

    def norms(self, axis: str) -> Tensor:
        """The norms of V along an axis, in a shape that broadcasts over it."""
        return self._norms_of_rows if axis == "out" else self._norms_of_columns

    @cached_property
    def _norms_of_rows(self) -> Tensor:
        return norms(self.V, "out")

    @cached_property
    def _norms_of_columns(self) -> Tensor:
        return norms(self.V, "in")

    def scaled(self, gain: Tensor) -> Tensor:
        """V g; for the same g the same tensor."""
        for known, W in self._scaled:
            if torch.equal(known, gain):
                return W
        self._scaled.append((gain, self.V * gain))
        return self._scaled[-1][1]


# What tools do that apply an adapter to what the one before has left: see `Tool.cautions`
AFTER_ANOTHER = "load a DoRA before other adapters: its magnitude also scales the change of an adapter loaded before it"
IN_TURN = f"{AFTER_ANOTHER}; files of --to diff add up in any order"

Formula: TypeAlias = Callable[[Update, Any, float], Tensor]  # of the update, m if there is one, and t


def scaling(parts: Parts) -> float:
    """Alpha / rank; 1 without alpha."""
    if products.method_of(parts):
        return products.scaling(parts)
    return float(parts["alpha"]) / rank_of(parts) if {"alpha", "A"} <= parts.keys() else 1.0


def axis_of_shape(m: Tensor, W0: Tensor) -> str:
    """The axis as loaders decide it: `out` where the first dimension of the magnitude is that of the weight."""
    return "out" if m.shape[0] == W0.shape[0] else "in"


def added(update: Update, m: Tensor | None, strength: float) -> Tensor:
    """W0 + t s B A, or with a difference of weights."""
    if "diff" in update.parts:
        return torch.add(update.W0, update.parts["diff"].to(update.W0.dtype).view_as(update.W0), alpha=strength)
    BA = update.BA()
    return torch.add(update.W0, BA, alpha=strength * update.scaling, out=BA)


def over_updated(update: Update, m: Tensor, strength: float) -> Tensor:
    """DoRA as in the paper, by the axis that the shape says."""
    return linear(update.W0, decomposed(update, m, update.norms(axis_of_shape(m, update.W0))), strength)


def over_updated_rows(update: Update, m: Tensor, strength: float) -> Tensor:
    """The same, where flat magnitudes are always of output rows."""
    return over_updated(update, of_rows(m, update.W0.dim()), strength)


def over_base(update: Update, m: Tensor, strength: float) -> Tensor:
    """The same as `over_updated`, where n is the norm of W0 on the output axis."""
    n = norms(update.W0, "out") if axis_of_shape(m, update.W0) == "out" else update.norms("in")
    return linear(update.W0, decomposed(update, m, n), strength)


def over_columns(update: Update, m: Tensor, strength: float) -> Tensor:
    """DoRA of input columns, whatever the shape of the magnitude: (O, 1) broadcasts."""
    return linear(update.W0, update.scaled(m.to(update.W0.dtype) / update.norms("in")), strength)


def decomposed(update: Update, m: Tensor, n: Tensor) -> Tensor:
    """V m / n as loaders compute it: by broadcasting, with fp32's epsilon at the norm."""
    return update.scaled(m.to(update.W0.dtype) / (n + EPS))


def linear(W0: Tensor, W: Tensor, strength: float) -> Tensor:
    """W0 + t (W - W0)."""
    return W if strength == 1 else W0 + strength * (W - W0)


@dataclass(frozen=True)
class Computation:
    """The weight that a tool computes.

    Attributes:
        dora: The formula of a module with a magnitude: one of these, or the tool's own.
        differs: What the tool does in another way than the paper, as the end of a sentence that begins with its name.
        axis: Over which axis it takes norms: `out`, `in`, or by the `shape` of the magnitude.
        lora: The formula of a module without a magnitude.
        strengths: The other strengths that people set in it; empty for trainers, which have none.
    """

    dora: Formula
    differs: str
    axis: str = "shape"
    lora: Formula = added
    strengths: tuple[float, ...] = (0.0, 0.5, 2.0)

    def formula(self, parts: Parts) -> Formula:
        """The formula of W(t) for the tensors of a module by role."""
        return self.dora if parts.keys() & {"m", "lost"} else self.lora

    def apply(self, parts: Parts, W0: Tensor, strength: float) -> Tensor:
        """W(t) as this tool computes it, from the tensors of a module by role, W0 and the strength t."""
        return self.formula(parts)(Update(without_magnitude(parts), W0), parts.get("m"), strength)

    def is_by_rows(self, parts: Parts, num_rows: int) -> bool:
        """Whether the formula computes each of so many rows from itself alone, without norms of columns."""
        on_rows = self.axis == "out" or (self.axis == "shape" and parts["m"].dim() > 1) if "m" in parts else True
        return on_rows and have_rows(parts, num_rows)

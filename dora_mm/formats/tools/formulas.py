"""The weights that tools compute from the tensors of a module. A `Tool` names one of these formulas, or has its own.

    V = W0 + s B A,    W' = V m / n,    W(t) = W0 + t (W' - W0)

where n is the norm of V or of W0. All is plain torch, in the dtype of W0; it broadcasts and raises where the tools do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.tools import products
from dora_mm.formats.tools.parts import Parts, down, with_rows

EPS = torch.finfo(torch.float32).eps


class Update:
    """What the tensors of a module make of a weight, or of some rows of it; each value is computed once.

    Attributes:
        parts: The tensors by role.
        W0: The weight.
    """

    def __init__(self, parts: Parts, W0: Tensor):
        self.parts, self.W0 = parts, W0

    @cached_property
    def scaling(self) -> float:
        """s, alpha / rank; 1 without alpha."""
        if products.method_of(self.parts):
            return products.scaling(self.parts)
        return float(self.parts["alpha"]) / self.parts["A"].shape[0] if "alpha" in self.parts else 1.0

    @cached_property
    def BA(self) -> Tensor:
        """B A in the shape and dtype of W0, without alpha; or the change that stands for it."""
        if products.method_of(self.parts):
            return products.product(self.parts, self.W0)
        A, B = down(self.parts).to(self.W0.dtype), self.parts["B"].to(self.W0.dtype)
        return (B.flatten(1) @ A.flatten(1)).view(self.W0.shape)

    @cached_property
    def V(self) -> Tensor:
        """W0 + s B A."""
        return self.W0 + (self.BA if self.scaling == 1 else self.scaling * self.BA)

    @property
    def m(self) -> Tensor:
        """The magnitude, in the dtype of W0."""
        return self.parts["m"].to(self.W0.dtype)

    @cached_property
    def axis(self) -> str:
        """The axis of the magnitude as most loaders decide it."""
        return axis_of_shape(self.parts["m"], self.W0)

    def norms(self, axis: str) -> Tensor:
        """The norms of V along an axis, in a shape that broadcasts over it."""
        return self._norms_of_rows if axis == "out" else self._norms_of_columns

    @cached_property
    def _norms_of_rows(self) -> Tensor:
        return norms(self.V, "out")

    @cached_property
    def _norms_of_columns(self) -> Tensor:
        return norms(self.V, "in")

    def over(self, W0: Tensor) -> Update:
        """The same tensors over another weight of the shape."""
        if W0 is self.W0:
            return self
        found = Update(self.parts, W0)
        if not products.method_of(self.parts) and "BA" in self.__dict__:
            found.BA = self.BA
        return found


Formula: TypeAlias = Callable[[Update, float], Tensor]


def axis_of_shape(m: Tensor, W0: Tensor) -> str:
    """The axis as loaders decide it: `out` where the first dimension of the magnitude is that of the weight."""
    return "out" if m.shape[0] == W0.shape[0] else "in"


def added(update: Update, strength: float) -> Tensor:
    """W0 + t s B A, or with a difference of weights."""
    if "diff" in update.parts:
        return torch.add(update.W0, update.parts["diff"].to(update.W0.dtype).view_as(update.W0), alpha=strength)
    return torch.add(update.W0, update.BA, alpha=strength * update.scaling)


def over_updated(update: Update, strength: float) -> Tensor:
    """DoRA as in the paper, by the axis that the shape says."""
    return linear(update.W0, decomposed(update, update.norms(update.axis)), strength)


def over_updated_rows(update: Update, strength: float) -> Tensor:
    """The same, where flat magnitudes are always of output rows."""
    parts = with_rows(update.parts)
    return over_updated(update if parts is update.parts else Update(parts, update.W0), strength)


def over_base(update: Update, strength: float) -> Tensor:
    """The same, where n is the norm of W0 on the output axis."""
    n = norms(update.W0, "out") if update.axis == "out" else update.norms("in")
    return linear(update.W0, decomposed(update, n), strength)


def over_columns(update: Update, strength: float) -> Tensor:
    """DoRA of input columns, whatever the shape of the magnitude: (O, 1) broadcasts."""
    return linear(update.W0, update.V * (update.m / update.norms("in")), strength)


def decomposed(update: Update, n: Tensor) -> Tensor:
    """V m / n as loaders compute it: by broadcasting, with fp32's epsilon at the norm."""
    return update.V * (update.m / (n + EPS))


def linear(W0: Tensor, W: Tensor, strength: float) -> Tensor:
    """W0 + t (W - W0)."""
    return W if strength == 1 else W0 + strength * (W - W0)

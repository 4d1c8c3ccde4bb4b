"""The formulas of DoRA in plain torch, for any floating dtype: the reference that every faster form is tested against.

Shapes: x (..., I), W0 (O, I), A (R, I), B (O, R), magnitude m and norms n, g (O,); T is the number of tokens. A
convolution kernel (O, I / groups, *K) is read as the matrix (O, I / groups * prod(K)): norms are per output row, so
stride, dilation and groups change nothing.

    V = W0 + s B A      n = ||V|| per row      g = m / n      W' = g V      W(t) = W0 + sum_k t_k (W'_k - W0)

(DoRA, arXiv 2402.09353, eq. 5.) The bias is never scaled. Everything of parameter size is computed in fp32, or float64
where the base is float64; only the products with x run in the base's or autocast's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CANCELLED = 1 / 4  # where n^2 is below this share of n0^2, the sum n0^2 + D has lost digits
SMALL_GAIN = 2.0**-6  # below it, dividing by g or m amplifies rounding
ROWS_AT_ONCE = 256


class Adapter(NamedTuple):
    """What the formulas need of one adapter: A and B are None for `magnitude`, magnitude is None for `lora`."""

    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    scaling: float = 1.0
    strength: float = 1.0
    norm_grad: str = "detached"

    def holding(self, A: Tensor | None, B: Tensor | None, magnitude: Tensor | None) -> Adapter:
        """With these tensors in the place of its own: torch 2.6 can compile neither `_replace` nor a slice."""
        return Adapter(A, B, magnitude, self.scaling, self.strength, self.norm_grad)


class RowGains(NamedTuple):
    """n and g of one adapter, (O,) each; both None for `lora`.

    regular: n > 0 and g >= SMALL_GAIN in every row, as it nearly always is; False where nobody has looked.
    """

    norm: Tensor | None
    gain: Tensor | None
    regular: bool = False


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of A, B, m, n and g over a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the base layer multiplies: autocast leaves float64 alone."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


# --- norms -----------------------------------------------------------------------------------------------------------


def row_norm(weight: Tensor) -> Tensor:
    """n0 = ||W0|| per output row, (O,). The only routine that computes it, so that g is exactly 1 at the start.

    Of the contiguous matrix in the adapter's dtype: other layouts and casts on the way sum in another order.
    """
    return torch.linalg.vector_norm(as_matrix(weight).contiguous(), dim=1)


def updated_norm(W0: Tensor, A: Tensor, B: Tensor, scaling: float, n0: Tensor, W0A: Tensor | None = None) -> Tensor:
    """n = ||W0 + s B A|| per row as n0 sqrt(1 + D / n0^2), without the dense update: n0 bit for bit where B is 0.

        D = rowsum(s B (2 W0 A^T + s B A A^T))

    Rows where W0 and the update nearly cancel, and rows of zeros, take the norm of their sum itself. In A's dtype; A is
    a matrix. W0A: W0 A^T, (O, R), where it is known already.
    """
    sB = B if scaling == 1 else B * scaling
    if W0A is None and W0.dtype != A.dtype:
        W0A = reduced_weight(W0, A)
    inner = torch.addmm(sB @ (A @ A.T), W0, A.T, alpha=2) if W0A is None else torch.addmm(W0A, sB, A @ A.T, beta=2)
    D = inner.mul_(sB).sum(1)
    ratio = (D / n0).div_(n0).add_(1)  # of the squares; NaN where n0 is 0
    norm = ratio.sqrt().mul_(n0)
    if torch.compiler.is_compiling():  # a compiled graph cannot branch on values
        return torch.where(is_lost(ratio), torch.linalg.vector_norm(torch.addmm(W0.to(A.dtype), sB, A), dim=1), norm)
    if not lies_between(ratio, CANCELLED, math.inf):
        rows = is_lost(ratio).nonzero()[:, 0]
        norm[rows] = torch.linalg.vector_norm(torch.addmm(W0[rows].to(A.dtype), sB[rows], A), dim=1)
    return norm


def is_lost(ratio: Tensor) -> Tensor:
    return ~((ratio >= CANCELLED) & (ratio < math.inf))


def lies_between(t: Tensor, least: float, bound: float) -> bool:
    """Whether least <= t < bound everywhere; waits for the device."""
    if t.numel() == 0:
        return True
    smallest, largest = t.aminmax()
    return smallest.item() >= least and largest.item() < bound


def reduced_weight(W0: Tensor, A: Tensor) -> Tensor:
    """W0 A^T, (O, R), for W0 in half precision: cast by blocks of rows on a processor, whose cache holds them."""
    blocks = W0.split(ROWS_AT_ONCE) if W0.device.type == "cpu" else [W0]
    return torch.cat([block.to(A.dtype) @ A.T for block in blocks])


def with_gain(magnitude: Tensor, norm: Tensor) -> RowGains:
    """g = m / n, and 1 where n is 0: published weights have hundreds of zero rows, and they must stay finite."""
    gain = magnitude / norm
    if gain.device.type == "cpu" and not torch.compiler.is_compiling() and lies_between(gain, SMALL_GAIN, math.inf):
        return RowGains(norm, gain, regular=True)
    return RowGains(norm, gain.masked_fill_(norm == 0, 1))


@torch.no_grad()
def row_gains(weight: Tensor, adapter: Adapter, n0: Tensor | None = None, W0A: Tensor | None = None) -> RowGains:
    """n and g as the parameters are; `n0` saves a pass over a weight that is known not to have changed."""
    if adapter.magnitude is None:
        return RowGains(None, None)
    norm = row_norm(weight.detach()) if n0 is None else n0
    if adapter.A is not None and adapter.B is not None:
        norm = updated_norm(weight.detach().flatten(1), adapter.A.flatten(1), adapter.B, adapter.scaling, norm, W0A)
    return with_gain(adapter.magnitude, norm)


# --- the merged weight -----------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W(t), shaped and laid out like `weight`, in fp32 (float64 under float64).

    At B = 0 and m = n0 it equals W0 bit for bit.
    """
    return merge_adapters(weight, adapters)[0]


@torch.no_grad()
def merge_adapters(
    weight: Tensor, adapters: Sequence[Adapter], rows: Sequence[RowGains] | None = None
) -> tuple[Tensor, tuple[RowGains, ...]]:
    """W(t) and the n and g in it. Without `rows`, n is the norm of V, which is there: one pass over it, and exact."""
    W0 = as_matrix(weight)
    merged = None
    found = []
    for index, adapter in enumerate(adapters):
        W = directions(W0, adapter)
        found.append(rows[index] if rows else row_gains_of_directions(W, adapter))
        gain = found[-1].gain
        if gain is not None:
            W = W.mul_(gain[:, None]) if W is not W0 else W * gain[:, None]
        if adapter.strength != 1:
            W = torch.add(W0, W - W0, alpha=adapter.strength)
        merged = W if merged is None else merged + (W - W0)
    return laid_out_like(W0 if merged is None else merged, weight), tuple(found)


def row_gains_of_directions(V: Tensor, adapter: Adapter) -> RowGains:
    if adapter.magnitude is None:
        return RowGains(None, None)
    return with_gain(adapter.magnitude, row_norm(V))


@torch.no_grad()
def rescaled(weight: Tensor, adapter: Adapter, strength: float) -> Adapter:
    """The adapter whose strength 1 is this one's strength t: again DoRA, of the same rank.

        W0 + t (g V - W0) = e (W0 + s B' A)    with e = 1 + t (g - 1), B' = (t g / e) B, and so m' = e ||W0 + s B' A||

    Raises:
        ValueError: t takes W0 out of a row (e = 0), so that no g does it.
    """
    gain = row_gains(weight, adapter).gain
    if gain is None:
        assert adapter.B is not None
        return adapter._replace(B=adapter.B * strength)
    e = 1 + strength * (gain - 1)
    if not e.all():
        raise ValueError(f"strength {strength:g} takes the base out of a row, which no adapter can: choose another one")
    if adapter.B is not None:
        adapter = adapter._replace(B=adapter.B * (strength * gain / e)[:, None])
    return adapter._replace(magnitude=e * row_norm(directions(as_matrix(weight), adapter)))


def directions(W0: Tensor, adapter: Adapter) -> Tensor:
    """V = W0 + s B A, (O, I); W0 itself where there is no A."""
    if adapter.A is None or adapter.B is None:
        return W0
    return torch.addmm(W0, adapter.B * adapter.scaling, adapter.A.flatten(1))


def as_matrix(weight: Tensor) -> Tensor:
    """W0 as (O, I) in the adapter's dtype, without a gradient."""
    return weight.detach().flatten(1).to(adapter_dtype(weight.dtype))


def any_nonzero(t: Tensor) -> bool:
    if t.device.type != "cpu":
        return bool(t.any())  # waits for the device once
    smallest, largest = t.aminmax()  # five times faster on a processor than any()
    return smallest.item() != 0 or largest.item() != 0


def laid_out_like(matrix: Tensor, weight: Tensor) -> Tensor:
    """`matrix` in the shape and strides of `weight`: a product may round differently for another memory layout."""
    shaped = matrix.view(weight.shape)
    if weight.is_contiguous() or shaped.stride() == weight.stride():
        return shaped
    return torch.empty_like(weight, dtype=matrix.dtype).copy_(shaped)


# --- gradients -------------------------------------------------------------------------------------------------------


def exact_norm_correction(W0: Tensor, adapter: Adapter, rows: RowGains, dm: Tensor) -> tuple[Tensor, Tensor]:
    """What `norm_grad: exact` adds to the detached (dA, dB): eq. 8 of the paper, dV = t g (dW - rowsum(dW V) V / n^2).

    With c = g dm / n, (O,), where dm has the strength t in it: dB -= s c V A^T and dA -= s (c B)^T V, with
    V A^T = W0 A^T + s B (A A^T), so that V is never built.
    """
    assert adapter.A is not None
    assert adapter.B is not None
    assert rows.norm is not None
    assert rows.gain is not None
    A, B, scaling = adapter.A.flatten(1), adapter.B, adapter.scaling
    c = torch.where(rows.norm == 0, 0.0, rows.gain * dm / rows.norm)[:, None]
    cB = c * B
    dB = -scaling * c * (W0 @ A.T + scaling * (B @ (A @ A.T)))
    dA = -scaling * (cB.T @ W0 + scaling * ((cB.T @ B) @ A))
    return dA.view_as(adapter.A), dB

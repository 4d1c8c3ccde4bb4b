"""The formulas of DoRA in plain torch, for any floating dtype: the reference that both forms are tested against.

    V = W0 + s B A      n = ||V|| per row      g = m / n      W' = g V      W(t) = W0 + sum_k t_k (W'_k - W0)

(DoRA, arXiv 2402.09353, eq. 5.) The symbols of core/ and kernels/, for T tokens, I input and O output features, rank R:

    x, y, b     input (..., I), output (..., O), bias (O,), which is never scaled
    W0          the base weight (O, I); a convolution kernel (O, I / groups, *K) is read as the matrix of its rows
    A, B        the low-rank update (R, I), (O, R); its scaling s = alpha / rank
    m, n, g     magnitude, row norms of V and gain, (O,); n0 are the row norms of W0
    t, W(t)     the strength of an adapter, and the weight with all adapters at their strengths
    e           1 + sum_k t_k (g_k - 1), (O,): the part of W0 in W(t)
    h, u        x A^T and dY B, (T, R); dX, dY, dA, dB, dm are gradients

Norms are per output row, so stride, dilation and groups of a convolution change nothing. Everything of parameter size
is computed in fp32, or float64 where the base is float64; only the products with x run in the dtype of the base, or of
autocast.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_mm.core.reads import RowMask

CANCELLED = 1 / 4  # where n^2 is below this fraction of n0^2, the sum n0^2 + D has lost digits
SMALL_GAIN = 2.0**-6  # below it, dividing by g or m amplifies rounding
ROWS_AT_ONCE = 256  # of a weight in half precision, cast to fp32 in blocks that fit into a processor's cache


class RowGains(NamedTuple):
    """n and g of one adapter with a magnitude.

    Attributes:
        norm: n (O,), in the adapter's dtype.
        gain: g (O,), in the adapter's dtype.
        regular: Whether n > 0 and g >= SMALL_GAIN are known to hold in every row, as they nearly always do; False where
            it was not checked.
        small: The rows with |g| <= SMALL_GAIN, on a device that has to be waited for; None where it was not checked.
    """

    norm: Tensor
    gain: Tensor
    regular: bool = False
    small: RowMask | None = None

    def of_rows(self, rows: slice) -> RowGains:
        """The norms and gains of some rows of the weight."""
        return RowGains(self.norm[rows], self.gain[rows], self.regular)


class Adapter(NamedTuple):
    """The tensors and factors of one adapter, as the formulas take them.

    Attributes:
        A: (R, I), or (R, I / groups, *K) for a convolution; None for method `magnitude`.
        B: (O, R); None for method `magnitude`.
        magnitude: m (O,); None for method `lora`.
        scaling: s, alpha / rank.
        strength: t.
        norm_grad: "detached" treats n as a constant in the backward pass, "exact" differentiates it.
        rows: n and g, where they are known; a pass sets them.
    """

    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    scaling: float = 1.0
    strength: float = 1.0
    norm_grad: str = "detached"
    rows: RowGains | None = None

    def with_tensors(self, A: Tensor | None, B: Tensor | None, magnitude: Tensor | None) -> Adapter:
        """The adapter with these tensors instead of its own; `_replace` takes twice as long."""
        return Adapter(A, B, magnitude, self.scaling, self.strength, self.norm_grad, self.rows)

    def of_rows(self, rows: slice) -> Adapter:
        """The adapter of some rows of the weight, without n and g."""
        B, m = (None if t is None else t[rows] for t in (self.B, self.magnitude))
        return Adapter(self.A, B, m, self.scaling, self.strength, self.norm_grad)

    def of_matrices(self, number: int) -> list[Adapter]:
        """The adapters of the matrices of a stack, from one with A (E, R, I), B (E, O, R) and m (E, O)."""
        own = ([None] * number if t is None else t.unbind() for t in (self.A, self.B, self.magnitude))
        return [self.with_tensors(*tensors) for tensors in zip(*own, strict=True)]

    def of_pass(self, rows: RowGains | None) -> Adapter:
        """The adapter with n and g, without its tensors."""
        return Adapter(None, None, None, self.scaling, self.strength, self.norm_grad, rows)


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of A, B, m, n and g over a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the base layer multiplies: autocast's, except for a float64 weight."""
    if weight.dtype != torch.float64 and autocasts(weight.device):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch raises an error for `meta`."""
    kind = device.type  # made anew whenever it is asked for
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which nothing is autocast on a device."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward method of an autograd.Function run without autocast, as its forward method does, and once.

    `once_differentiable` is left out where nothing records gradients: it costs as much as a product of a small layer.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, dY: Tensor) -> Any:
        chosen = once if torch.is_grad_enabled() else backward
        with without_autocast(dY.device):
            return chosen(ctx, dY)

    return run


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which takes three times as long to find that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def can_read(t: Tensor) -> bool:
    """Whether the program may branch on the values of a tensor: a recorded graph cannot, and `meta` has none."""
    if torch.compiler.is_compiling() or t.is_meta:
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def reads_wait(t: Tensor) -> bool:
    """Whether the program may branch on the values of a tensor, and has to wait for a device to know them."""
    return t.device.type != "cpu" and can_read(t)


# --- norms -----------------------------------------------------------------------------------------------------------


def row_norm(weight: Tensor) -> Tensor:
    """Computes n0 = ||W0|| per output row.

    Nothing else computes it, so that g is exactly 1 at the start. It is the norm of the contiguous matrix in the
    adapter's dtype: other layouts, and casts during the sum, would add in another order. (In Triton and outside
    `fixed_parameters`, the kernel that computes n adds it up by itself: g is then 1 up to 3e-7.)

    Args:
        weight: W0 (O, I), or a kernel (O, I / groups, *K).

    Returns:
        n0 (O,) in the adapter's dtype.
    """
    return torch.linalg.vector_norm(as_matrix(weight).contiguous(), dim=1)


def updated_norm(W0: Tensor, A: Tensor, B: Tensor, scaling: float, n0: Tensor) -> Tensor:
    """Computes n = ||W0 + s B A|| per row without the dense update: n0 bit for bit where B is 0.

        n = n0 sqrt(1 + D / n0^2)    with D = rowsum(s B (2 W0 A^T + s B A A^T))

    Where W0 and the update nearly cancel, and where W0 is 0, the norm is taken of the dense sum of that row.

    Args:
        W0: (O, I), in any floating dtype.
        A: (R, I).
        B: (O, R), of the dtype of A.
        scaling: s.
        n0: The row norms of W0 (O,), of the dtype of A.

    Returns:
        n (O,), in the dtype of A.
    """
    sB = B if scaling == 1 else B * scaling
    if W0.dtype == A.dtype:
        inner = torch.addmm(sB @ (A @ A.T), W0, A.T, alpha=2)
    else:
        inner = torch.addmm(reduced_weight(W0, A), sB, A @ A.T, beta=2)
    D = inner.mul_(sB).sum(1)
    ratio = (D / n0).div_(n0).add_(1)  # n^2 / n0^2 (n0^2 may overflow); NaN where n0 is 0
    norm = ratio.sqrt().mul_(n0)
    if ratio.device.type != "cpu" or not can_read(ratio):  # a GPU would have to be waited for
        return torch.where(is_lost(ratio), torch.linalg.vector_norm(torch.addmm(W0.to(A.dtype), sB, A), dim=1), norm)
    if not lies_between(ratio, CANCELLED, math.inf):
        rows = is_lost(ratio).nonzero()[:, 0]
        norm[rows] = torch.linalg.vector_norm(torch.addmm(W0[rows].to(A.dtype), sB[rows], A), dim=1)
    return norm


def is_lost(ratio: Tensor) -> Tensor:
    """The rows whose n^2 / n0^2 has lost digits, or is not a number: a boolean mask (O,)."""
    return ~((ratio >= CANCELLED) & (ratio < math.inf))


def lies_between(t: Tensor, least: float, bound: float) -> bool:
    """Whether least <= t < bound everywhere; waits for the device."""
    if t.numel() == 0:
        return True
    smallest, largest = t.aminmax()
    return smallest.item() >= least and largest.item() < bound


def reduced_weight(W0: Tensor, A: Tensor) -> Tensor:
    """Returns W0 A^T (O, R) for W0 in half precision, cast in blocks of rows that fit into a processor's cache."""
    blocks = W0.split(ROWS_AT_ONCE) if W0.device.type == "cpu" else [W0]
    return torch.cat([block.to(A.dtype) @ A.T for block in blocks])


def with_gain(magnitude: Tensor, norm: Tensor) -> RowGains:
    """Returns n and g = m / n. g is 1 where n is 0: published weights have hundreds of zero rows."""
    gain = magnitude / norm
    if gain.device.type == "cpu" and can_read(gain) and lies_between(gain, SMALL_GAIN, math.inf):
        return RowGains(norm, gain, regular=True)
    gain.masked_fill_(norm == 0, 1)
    return RowGains(norm, gain, small=RowMask(gain.abs() <= SMALL_GAIN) if reads_wait(gain) else None)


@torch.no_grad()
def row_gains(weight: Tensor, adapter: Adapter, n0: Tensor | None = None) -> RowGains | None:
    """Computes n and g of one adapter from the current parameters; None where it has no magnitude.

    Args:
        weight: W0 (O, I), or a kernel (O, I / groups, *K).
        adapter: The adapter.
        n0: The row norms of W0 (O,), where they are known already.
    """
    if adapter.magnitude is None:
        return None
    norm = row_norm(weight.detach()) if n0 is None else n0
    if adapter.A is not None and adapter.B is not None:
        norm = updated_norm(weight.detach().flatten(1), adapter.A.flatten(1), adapter.B, adapter.scaling, norm)
    return with_gain(adapter.magnitude, norm)


# --- the merged weight -----------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Computes W(t), which equals W0 bit for bit at B = 0 and m = n0.

    Args:
        weight: W0 (O, I), or a kernel (O, I / groups, *K).
        adapters: The adapters, each with its strength.

    Returns:
        W(t) in the shape and memory layout of `weight`, in fp32, or float64 for a float64 weight.
    """
    return merge_adapters(weight, adapters)[0]


@torch.no_grad()
def merge_adapters(
    weight: Tensor, adapters: Sequence[Adapter], rows: Sequence[RowGains | None] | None = None
) -> tuple[Tensor, tuple[RowGains | None, ...]]:
    """Computes W(t), and n and g of every adapter.

    Args:
        weight: W0 (O, I), or a kernel (O, I / groups, *K).
        adapters: The adapters, each with its strength.
        rows: n and g of every adapter, where they are known already. Otherwise n is the norm of the dense V, which is
            exact and costs one pass over it.

    Returns:
        W(t), as `merged_weight` returns it, and n and g of every adapter.
    """
    W0 = as_matrix(weight)
    merged = None
    found = []
    for index, adapter in enumerate(adapters):
        W = directions(W0, adapter)
        found.append(rows[index] if rows else row_gains_of(W, adapter))
        own = found[-1]
        if own is not None:
            W = W.mul_(own.gain[:, None]) if W is not W0 else W * own.gain[:, None]
        if adapter.strength != 1:
            W = torch.add(W0, W - W0, alpha=adapter.strength)
        merged = W if merged is None else merged + (W - W0)
    return laid_out_like(W0 if merged is None else merged, weight), tuple(found)


def row_gains_of(V: Tensor, adapter: Adapter) -> RowGains | None:
    """`row_gains`, for an adapter whose V is built."""
    return None if adapter.magnitude is None else with_gain(adapter.magnitude, row_norm(V))


def directions(W0: Tensor, adapter: Adapter) -> Tensor:
    """Returns V = W0 + s B A (O, I) for a matrix W0 in the adapter's dtype; W0 itself where there is no A."""
    if adapter.A is None or adapter.B is None:
        return W0
    return torch.addmm(W0, adapter.B * adapter.scaling, adapter.A.flatten(1))


def as_matrix(weight: Tensor) -> Tensor:
    """Returns W0 as a matrix (O, I) in the adapter's dtype, detached."""
    return weight.detach().flatten(1).to(adapter_dtype(weight.dtype))


def any_nonzero(t: Tensor) -> bool:
    """Whether any entry differs from 0; waits for the device."""
    if t.device.type != "cpu":
        return bool(t.any())  # one wait instead of two
    smallest, largest = t.aminmax()  # five times faster on a CPU than any()
    return smallest.item() != 0 or largest.item() != 0


def laid_out_like(matrix: Tensor, weight: Tensor) -> Tensor:
    """Returns `matrix` in the shape and strides of `weight`: in another layout a product may round differently."""
    shaped = matrix.view(weight.shape)
    if weight.is_contiguous() or shaped.stride() == weight.stride():
        return shaped
    return torch.empty_like(weight, dtype=matrix.dtype).copy_(shaped)


# --- drawing and rounding --------------------------------------------------------------------------------------------


def seeded_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the path of the module, not on the order of the layers."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def round_stochastically(W: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds each entry of W to `dtype`, up or down, with the probabilities that preserve its expectation.

    Entries that `dtype` represents exactly stay. Rounding to nearest would drop every update below half a unit in the
    last place.

    Args:
        W: Any shape, in fp32.
        dtype: The dtype of the result, of half precision.
        generator: A CPU generator.
    """
    info = torch.finfo(dtype)
    power = (W.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two at or below |W|
    unit = power.clamp_(min=info.smallest_normal).mul_(info.eps)
    quotient = W / unit  # exact, as is what follows
    lower = quotient.floor()
    noise = torch.rand(W.shape, generator=generator, dtype=torch.float32, device="cpu").to(W.device)
    lower += noise < quotient.sub_(lower)
    return lower.mul_(unit).clamp_(info.min, info.max).to(dtype)


def shares(merged: Tensor, W: Tensor, W0: Tensor) -> tuple[float, float]:
    """Returns <merged - W0, W - W0> and <W - W0, W - W0>."""
    update, stored = W - W0, merged.to(W.dtype) - W0
    return (stored * update).sum(dtype=torch.float64).item(), (update * update).sum(dtype=torch.float64).item()


# --- gradients -------------------------------------------------------------------------------------------------------


def exact_norm_correction(W0: Tensor, adapter: Adapter, dm: Tensor) -> tuple[Tensor, Tensor]:
    """Computes what `norm_grad: exact` adds to the detached gradients of A and B.

    Eq. 8 of the paper is dV = t g (dW - rowsum(dW V) V / n^2). With c = g dm / n, where dm includes the strength t,
    dB -= s c V A^T and dA -= s (c B)^T V. V A^T is W0 A^T + s B (A A^T), so that V is never built.

    Args:
        W0: The weight as a matrix (O, I), in the adapter's dtype.
        adapter: The adapter, with A, B, a magnitude, n and g.
        dm: The gradient of the magnitude (O,).

    Returns:
        What to add to dA, in the shape of A, and to dB (O, R).
    """
    rows = adapter.rows
    assert adapter.A is not None
    assert adapter.B is not None
    assert rows is not None
    A, B, scaling = adapter.A.flatten(1), adapter.B, adapter.scaling
    c = torch.where(rows.norm == 0, 0.0, rows.gain * dm / rows.norm)[:, None]
    cB = c * B
    dB = -scaling * c * (W0 @ A.T + scaling * (B @ (A @ A.T)))
    dA = -scaling * (cB.T @ W0 + scaling * ((cB.T @ B) @ A))
    return dA.view_as(adapter.A), dB

"""The formulas of DoRA in plain torch, for any floating dtype: the reference that every faster form is tested against.

Shapes: x (..., I), W0 (O, I), A (R, I), B (O, R), magnitude m and norms n, g (O,); T is the number of tokens. A
convolution kernel (O, I / groups, *K) is read as the matrix (O, I / groups * prod(K)): norms are per output row, so
stride, dilation and groups change nothing.

    V = W0 + s B A      n = ||V|| per row      g = m / n      W' = g V      W(t) = W0 + sum_k t_k (W'_k - W0)

(DoRA, arXiv 2402.09353, eq. 5.) The bias is never scaled. Everything of parameter size is computed in fp32, or float64
where the base is float64; only the products with x run in the base's or autocast's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CANCELLED = 1 / 16  # where n^2 is below this share of n0^2, the sum n0^2 + D has lost its digits


class Adapter(NamedTuple):
    """What the formulas need of one adapter: A and B are None for `magnitude`, magnitude is None for `lora`."""

    A: Tensor | None
    B: Tensor | None
    magnitude: Tensor | None
    scaling: float = 1.0
    strength: float = 1.0
    norm_grad: str = "detached"


class Prepared(NamedTuple):
    """The part of a forward pass that depends on parameters alone.

    weight: W(t), differentiable; operand: what x is multiplied with: W(t) itself, or in half precision its rounded
    value (high), or [high, low] side by side on the input axis if `doubled`, so that nothing of the update is lost.
    """

    weight: Tensor
    operand: Tensor
    doubled: bool = False

    def without_gradient(self) -> Prepared:
        """What inference keeps: the operand alone."""
        return Prepared(self.operand, self.operand, self.doubled)


class Forward(NamedTuple):
    """One implementation of the layer's forward pass; a backend is a value of this type."""

    prepare: Callable[..., Prepared]
    linear: Callable[..., Tensor]
    conv: Callable[..., Tensor]


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of A, B, m, n and g over a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the base layer multiplies: autocast leaves float64 alone."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


# --- norms -----------------------------------------------------------------------------------------------------------


def row_norm(weight: Tensor) -> Tensor:
    """n0 = ||W0|| per output row, (O,). The only routine that computes it, so that g is exactly 1 at the start."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=adapter_dtype(weight.dtype))


def updated_norm(W0: Tensor, delta: Tensor, n0: Tensor, buffer: Tensor) -> Tensor:
    """n = ||W0 + delta|| per row as sqrt(n0^2 + D), D = rowsum(delta (2 W0 + delta)): n0 bit for bit where delta is 0.

    Rows where W0 and delta nearly cancel take the norm of W0 + delta itself. `buffer` (O, I) is overwritten.
    """
    D = torch.add(delta, W0, alpha=2, out=buffer).mul_(delta).sum(1)
    square0 = n0 * n0
    square = square0 + D
    # MKL's vectorised sqrt(n0 * n0) differs from n0 in 11 of a million values, hence the choice where D is 0
    norm = torch.where(D == 0, n0, square.clamp_min(0).sqrt())
    cancelled = square < square0 * CANCELLED
    if torch.compiler.is_compiling() or cancelled.any():
        norm = torch.where(cancelled, torch.linalg.vector_norm(W0 + delta, dim=1), norm)
    return norm


def row_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n, and 1 where n is 0: published weights have hundreds of zero rows, and they must stay finite."""
    return torch.where(norm == 0, torch.ones_like(norm), magnitude / norm)


# --- the merged weight -----------------------------------------------------------------------------------------------


def merged_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W(t), shaped and laid out like `weight`, in fp32 (float64 under float64), differentiable in A, B and m.

    At B = 0 and m = n0 it equals W0 bit for bit. `norm_grad="detached"` treats n as a constant in the backward pass
    (eq. 12 of the paper), `"exact"` differentiates it.
    """
    if not adapters:
        return weight.detach().to(adapter_dtype(weight.dtype))
    parts = [
        _MergedWeight.apply(weight, a.A, a.B, a.magnitude, a.scaling, a.strength, a.norm_grad == "exact")
        for a in adapters
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + (part - weight.detach())
    return merged


class _MergedWeight(torch.autograd.Function):
    """W(t) of one adapter. Autograd through the formula would keep V, s B A and W0 in fp32 for every layer; here only
    the parameters and two (O,) vectors are kept, and the exact norm gradient costs thin products instead of a graph."""

    @staticmethod
    def forward(ctx, weight, A, B, magnitude, scaling, strength, exact):
        W0 = weight.detach().flatten(1).to(adapter_dtype(weight.dtype))
        norm = gain = None
        W = torch.empty_like(W0)  # the one buffer beside delta: allocating costs more than computing here
        delta = None if A is None else (B * scaling) @ A.flatten(1)
        if magnitude is not None:
            norm = row_norm(weight.detach())
            if delta is not None:
                norm = updated_norm(W0, delta, norm, buffer=W)
            gain = row_gain(magnitude, norm)
        if delta is None:
            W.copy_(W0)
        else:
            torch.add(W0, delta, out=W)
        if gain is not None:
            W.mul_(gain[:, None])
        if strength != 1:
            W = torch.add(W0, W.sub_(W0), alpha=strength)
        ctx.save_for_backward(weight, A, B, norm, gain)
        ctx.scaling, ctx.strength, ctx.exact = scaling, strength, exact
        return _laid_out_like(W, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        weight, A, B, norm, gain = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            raise ValueError("the weight of an adapted layer has no gradient: leave its requires_grad False")
        dW = grad_outputs[0].flatten(1)
        if ctx.strength != 1:
            dW = dW * ctx.strength
        W0 = weight.flatten(1).to(dW.dtype)
        dA, dB, dm = _adapter_gradients(dW, W0, A, B, norm, gain, ctx.scaling, ctx.exact)
        return None, dA, dB, dm, None, None, None


def _adapter_gradients(dW, W0, A, B, norm, gain, scaling, exact):
    """(dA, dB, dm) from dW = dLoss/dW', (O, I).

    detached: dV = g dW            exact: dV = g (dW - dm V / n)            dm = rowsum(dW V) / n, 0 where n is 0
    with rowsum(dW V) = rowsum(dW W0) + s rowsum((dW A^T) B), and V A^T = W0 A^T + s B (A A^T): V is never built.
    """
    if A is None:
        return None, None, torch.where(norm == 0, 0.0, (dW * W0).sum(1) / norm)
    A_matrix = A.flatten(1)
    P = dW @ A_matrix.T  # (O, R)
    if norm is None:
        return scaling * (B.T @ dW).view_as(A), scaling * P, None
    dm = torch.where(norm == 0, 0.0, ((dW * W0).sum(1) + scaling * (P * B).sum(1)) / norm)
    g = gain[:, None]
    dA, dB = (g * B).T @ dW, g * P
    if exact:
        c = torch.where(norm == 0, 0.0, gain * dm / norm)[:, None]
        cB = c * B
        dB = dB - c * (W0 @ A_matrix.T + scaling * (B @ (A_matrix @ A_matrix.T)))
        dA = dA - cB.T @ W0 - scaling * ((cB.T @ B) @ A_matrix)
    return (scaling * dA).view_as(A), scaling * dB, dm


def _laid_out_like(matrix: Tensor, weight: Tensor) -> Tensor:
    """`matrix` in the shape and strides of `weight`: a product may round differently for another memory layout."""
    shaped = matrix.view(weight.shape)
    if weight.is_contiguous():
        return shaped
    return torch.empty_like(weight, dtype=matrix.dtype).copy_(shaped)


# --- the layer -------------------------------------------------------------------------------------------------------


def prepare(weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> Prepared:
    """What `dora_linear` and `dora_conv` multiply x with in `dtype` (see `product_dtype`).

    In half precision W(t) may not be rounded to one number: a bf16 base lies on the bf16 grid, so an update below half
    a unit in the last place would vanish. It becomes high + low, and x meets both in one product that rounds once.
    """
    with torch.autocast(weight.device.type, enabled=False):
        W = merged_weight(weight, adapters)
        if dtype == W.dtype:
            return Prepared(W, W)
        if dtype != weight.dtype:  # autocast: the base multiplies with cast(W0), and a fresh adapter must change no bit
            W = W + (_cast_weight(weight, dtype).to(W.dtype) - weight.detach())
        with torch.no_grad():
            high = W.to(dtype)
            low = high.to(W.dtype)
            torch.sub(W, low, out=low)  # in place: an operation on mixed dtypes makes copies of its own
            doubled = _any(low)
            operand = torch.cat([high, low.to(dtype)], 1) if doubled else high
    return Prepared(W, operand, doubled)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    *,
    dropout: float = 0.0,
    prepared: Prepared | None = None,
) -> Tensor:
    """y = x W(t)^T + b in the dtype that `F.linear(x, weight, bias)` would return, autocast included.

    `dropout` drops entries of x in the update alone, as the official layer does: x W0^T + drop(x) (W(t) - W0)^T + b.
    """
    dtype = product_dtype(weight)
    prepared = prepared or prepare(weight, adapters, dtype)
    x, bias = _cast_inputs(x, bias, weight, dtype)
    with torch.autocast(weight.device.type, enabled=False):
        if dropout:
            return _with_dropout(x, weight, bias, prepared, dropout, F.linear, _join_features)
        if prepared.operand is prepared.weight and not prepared.doubled:
            return F.linear(x, prepared.weight, bias)
        return _SplitLinear.apply(x, prepared.weight, bias, prepared.operand, prepared.doubled)


def dora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    *,
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    groups: int = 1,
    dropout: float = 0.0,
    prepared: Prepared | None = None,
) -> Tensor:
    """The same for a convolution; `convolve(x, kernel, bias)` holds its stride, padding and dilation."""
    dtype = product_dtype(weight)
    prepared = prepared or prepare(weight, adapters, dtype)
    x, bias = _cast_inputs(x, bias, weight, dtype)
    batch_dims = x.dim() - (weight.dim() - 1)  # 0 for an unbatched input

    def join(a: Tensor, b: Tensor) -> Tensor:
        return _join_channels(a, b, groups, batch_dims)

    with torch.autocast(weight.device.type, enabled=False):
        if dropout:
            return _with_dropout(x, weight, bias, prepared, dropout, convolve, join)
        if prepared.operand is prepared.weight and not prepared.doubled:
            return convolve(x, prepared.weight, bias)
        return _SplitConv.apply(x, prepared.weight, bias, prepared.operand, prepared.doubled, convolve, join)


TORCH = Forward(prepare, dora_linear, dora_conv)


def _with_dropout(x, weight, bias, prepared, dropout, product, join):
    dropped = F.dropout(x, dropout)
    base = _cast_weight(weight, x.dtype)
    delta = prepared.weight - base
    if x.dtype != delta.dtype:
        delta = delta.to(x.dtype)
        if _any(delta):  # one product that rounds once: a correction to an already rounded product would be lost
            return product(join(x, dropped), torch.cat([base, delta], 1), bias)
    return product(x, base, bias) + product(dropped, delta, None)


class _SplitLinear(torch.autograd.Function):
    """x [high + low]^T + b. Only `high` is kept for dX, which half precision rounds to as much anyway."""

    @staticmethod
    def forward(ctx, x, W, bias, operand, doubled):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, _high(operand, doubled))
        ctx.weight_dtype = W.dtype
        return F.linear(_join_features(x, x) if doubled else x, operand, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        (dY,) = grad_outputs
        x, high = ctx.saved_tensors
        needs_x, needs_W, needs_bias = ctx.needs_input_grad[:3]
        dX = dY @ high if needs_x else None
        rows = dY.reshape(-1, dY.shape[-1])
        dW = (rows.T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype) if needs_W else None
        return dX, dW, rows.sum(0) if needs_bias else None, None, None


class _SplitConv(torch.autograd.Function):
    """The same for a convolution. Its backward repeats the forward pass with `high`, for the graph that torch knows."""

    @staticmethod
    def forward(ctx, x, W, bias, operand, doubled, convolve, join):
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, _high(operand, doubled), bias)
        ctx.convolve, ctx.weight_dtype = convolve, W.dtype
        return convolve(join(x, x) if doubled else x, operand, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        inputs = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.enable_grad():
            y = ctx.convolve(*inputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad_outputs[0]))
        dX, dW, db = (next(found) if t is not None and t.requires_grad else None for t in inputs)
        return dX, None if dW is None else dW.to(ctx.weight_dtype), db, None, None, None, None


def _high(operand: Tensor, doubled: bool) -> Tensor:
    """The high part in memory of its own: a view would keep the low part alive until the backward pass."""
    return operand[:, : operand.shape[1] // 2].clone(memory_format=torch.preserve_format) if doubled else operand


def _cast_inputs(x: Tensor, bias: Tensor | None, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and b as the base layer would multiply them: autocast casts both, otherwise they must match already."""
    if dtype == weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        return x, bias
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype)


def _join_features(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], -1)


def _join_channels(a: Tensor, b: Tensor, groups: int, batch_dims: int) -> Tensor:
    """Channels of a and b side by side within each group, as [high, low] are in the kernel."""
    split = [t.unflatten(batch_dims, (groups, -1)) for t in (a, b)]
    return torch.cat(split, batch_dims + 1).flatten(batch_dims, batch_dims + 1)


def _any(low: Tensor) -> bool:
    """Whether the low part is needed. Doubling the inner dimension changes the order of summation in some bf16 shapes
    (640 x 640 with 2048 tokens), so a fresh adapter goes without it. A compiled graph cannot branch on values."""
    if torch.compiler.is_compiling():
        return True
    smallest, largest = low.aminmax()  # five times faster on a processor than any()
    return bool((smallest != 0) | (largest != 0))

"""The fused computation of PEFT's DoRA layers: one autograd.Function per adapter, and the row norms.

    z = g (y - b) + b + h (s g B)^T       h = A x; g = m / n; n = ||W0 + s B A|| per row, a constant

y is the output of the base layer, or of the adapter before. PEFT's formula keeps some six tensors of the size of y for
its backward pass; this one keeps y, and h. Symbols as in core/functional.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm import backend
from dora_mm.core.functional import adapter_dtype, can_read, cast, first_order, without_autocast
from dora_mm.core.ops import BLOCK, LINEAR, Op, as_rows, per_row, row_sums, sum_tokens

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowFactors(NamedTuple):
    """The factors of the rows of one adapter that a pass needs, all in at least fp32.

    Attributes:
        gain: g (O,).
        divisor: The divisor of dm (O,): n, infinite where it is 0 (0 where kernels of ours divide).
        shift: (1 - g) b (O,); None without a bias.
        factors: s g (O, 1); None where kernels of ours compute it, and so is the next.
        scaled_B: s g B (O, R).
    """

    gain: Tensor
    divisor: Tensor
    shift: Tensor | None
    factors: Tensor | None
    scaled_B: Tensor | None


class Scaled(torch.autograd.Function):
    """z, computed in fp32 and rounded once, from y, b, h, B, m and `base`, in which it is differentiable.

    With dropout y is the product of what it leaves of x, and z is the change that an adapter makes to `base`, the
    output of the layer itself: z = base + (g - 1) (y - b) + h (s g B)^T. Without, `base` is None.

    `rows` are the `RowFactors` of the parameters.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, y, bias, h, B, magnitude, base, rows: RowFactors, scaling: float, dtype):
        rows = prepared(op, y, B, rows, scaling, base)
        ctx.op, ctx.scaling, ctx.base_dtype = op, scaling, None if base is None else base.dtype
        ctx.in_triton = rows.scaled_B is None
        ctx.dtype = B.dtype if magnitude.dtype == B.dtype else rows.gain.dtype
        own = () if ctx.in_triton else (rows.factors, rows.scaled_B)
        ctx.save_for_backward(y, bias, h, B, rows.divisor, rows.gain, *own)
        return output(op, y, h, B, rows, scaling, dtype, base)

    @staticmethod
    @first_order
    def backward(ctx: Any, dz: Tensor):
        y, bias, h, B, divisor, gain, *own = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:6]
        if ctx.in_triton:
            from dora_mm.kernels import scaled

            found = scaled.gradients(ctx.scaling, dz, needs, y, bias, h, B, divisor, gain, ctx.dtype)
        else:
            multiplier = gain if ctx.base_dtype is None else gain - 1
            given = y, bias, h, B, divisor, gain, multiplier, *own
            found = torch_gradients(ctx.op, ctx.scaling, dz, needs, *given)
        return None, *found, None if ctx.base_dtype is None else cast(dz, ctx.base_dtype), None, None, None


def prepared(op: Op, y: Tensor, B: Tensor, rows: RowFactors, scaling: float, base: Tensor | None) -> RowFactors:
    """Adds the products to rows, unless they have them or the pass runs in our kernels."""
    is_ready = rows.scaled_B is not None or (base is None and runs_in_triton(op, y))
    return rows if is_ready else with_products(rows, B, scaling)


def output(op: Op, y, h, B, rows: RowFactors, scaling: float, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """Computes z from rows that are `prepared`: see `Scaled`."""
    if rows.scaled_B is None:
        from dora_mm.kernels import scaled

        return scaled.output(y, rows.shift, rows.gain, h, B, scaling, dtype)
    gain = rows.gain if base is None else rows.gain - 1
    with without_autocast(y.device):
        return torch_output(op, y, rows.shift, gain, h, rows.scaled_B, dtype, base)


def row_factors(W0, A, B, m, bias, scaling: float, transposed: bool) -> RowFactors:
    """Computes g, n and (1 - g) b from the parameters as they are; see `gains`."""
    gain, divisor = gains(W0, A, B, m, scaling, transposed)
    shift = None if bias is None else torch.addcmul(bias, gain, bias, value=-1)
    return RowFactors(gain, divisor, shift, None, None)


def with_products(rows: RowFactors, B: Tensor, scaling: float) -> RowFactors:
    """Adds s g and s g B."""
    divisor, factors = rows.divisor, (rows.gain * scaling).unsqueeze(1)
    if runs_in_triton(LINEAR, divisor):  # from our kernels, which leave 0
        divisor = divisor.masked_fill(divisor == 0, math.inf)
    return RowFactors(rows.gain, divisor, rows.shift, factors, B * factors)


def gains(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float, transposed: bool) -> tuple[Tensor, Tensor]:
    """Computes g, 1 where n is 0, and what dm is divided by: n, infinite where it is 0.

    Args:
        W0: As for `row_norms`, and so are the others.
        A: (R, I).
        B: (O, R).
        m: m (O,).
        scaling: s.
        transposed: See W0.
    """
    if runs_in_triton(LINEAR, W0):
        from dora_mm.kernels import scaled

        return scaled.gains(W0.t() if transposed else W0, A, B, m, scaling)
    norm = row_norms(W0, A, B, scaling, transposed)
    gain = m / norm
    if norm.device.type == "cpu" and can_read(norm) and norm.min().item() > 0:
        return gain, norm
    is_zero = norm == 0
    return gain.masked_fill_(is_zero, 1), norm.masked_fill(is_zero, math.inf)


def runs_in_triton(op: Op, t: Tensor) -> bool:
    """Whether passes over a tensor run in our kernels: those of a Linear, where the backend has chosen them."""
    return op is LINEAR and backend.CHOSEN[t.is_cuda] is not backend.TORCH and t.dtype in KERNEL_DTYPES


# --- in plain torch --------------------------------------------------------------------------------------------------


def torch_output(op, y, shift, gain, h, scaled_B, dtype, base=None) -> Tensor:
    """Returns `base` + `gain` y + `shift` + h `scaled_B`^T in `dtype`."""
    if op is LINEAR and base is None and y.numel() <= BLOCK:
        # Few tokens: each call counts, and a product with R rows in bf16 takes three times as long as one in fp32.
        z = y * gain if shift is None else torch.addcmul(shift, y, gain)
        return cast(z.add_(F.linear(cast(h, z.dtype), scaled_B)), dtype)
    g, is_half = per_row(op, gain, y), op is LINEAR and h.dtype.itemsize < 4
    shift = None if shift is None else per_row(op, shift, y)
    operand = cast(scaled_B, h.dtype).t() if is_half else scaled_B

    def sum_of(y: Tensor, h: Tensor, base: Tensor | None = None) -> Tensor:
        z = y * g if shift is None else torch.addcmul(shift, y, g)
        if base is not None:
            z = z.add_(base)
        return z.add_(h @ operand) if is_half else op.add_expanded(z, cast(h, z.dtype), operand)

    return in_blocks(op, sum_of, dtype, *((y, h) if base is None else (y, h, base)))


def torch_gradients(
    op, scaling, dz, needs, y, bias, h, B, divisor, gain, multiplier, factors, scaled_B
) -> Sequence[Tensor | None]:
    """Returns the gradients of y, which z has `multiplier` times, b, h, B and m that are needed.

    Those of h and B are products in the dtype of h.
    """
    needs_y, needs_bias, needs_h, needs_B, needs_m = needs
    operand, product, dh, dm, dy = cast(scaled_B, h.dtype), None, [], None, None
    for some_dz, some_h in blocks(op, dz.dtype != h.dtype, dz, h):
        d = cast(some_dz, h.dtype)
        if needs_B or needs_m:
            part = cast(op.grad_B(d, some_h, B), gain.dtype)
            product = part if product is None else product.add_(part)
        if needs_h:
            dh.append(op.grad_h(d, operand))
    if needs_m:
        sums, _ = row_sums(op, dz, y, bias, wants_squares=False)
        dm = torch.add(sums, (product * B).sum(1), alpha=scaling).div_(divisor)
    if needs_y:
        g = per_row(op, multiplier, dz)
        dy = in_blocks(op, lambda d: d * g, y.dtype, dz)
    dbias = (1 - gain) * sum_tokens(op, dz) if needs_bias else None
    dB = product * factors if needs_B and product is not None else None
    return dy, dbias, (dh[0] if len(dh) == 1 else torch.cat(dh)).view(h.shape) if dh else None, dB, dm


def blocks(op: Op, casts: bool, *tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Tensors with the same tokens, the largest first; of a Linear as (T, ...).

    Where they are cast on a CPU, they come in blocks that stay in its cache: to allocate pages for a tensor of
    2048 x 1280 in fp32 takes as long as a third of the layer's product in bf16.
    """
    if op.feature_dim != -1:
        return [tensors]
    rows = [as_rows(t) for t in tensors]
    if not casts or torch.compiler.is_compiling() or rows[0].device.type != "cpu" or rows[0].numel() <= BLOCK:
        return [tuple(rows)]
    return list(zip(*(t.split(max(1, BLOCK // rows[0].shape[1])) for t in rows), strict=True))


def in_blocks(op: Op, function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """Applies `function` to tensors block by block; the result has the shape of the first one and `dtype`."""
    like, parts = tensors[0], blocks(op, dtype.itemsize < 4, *tensors)
    if len(parts) == 1:
        return cast(function(*parts[0]), dtype).view(like.shape)
    found = torch.empty(like.shape, dtype=dtype)
    for some, part in zip(as_rows(found).split(len(parts[0][0])), parts, strict=True):
        some.copy_(function(*part))
    return found


def row_norms(W0: Tensor, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """Computes n = ||W0 + s B A|| per output row, of the dense sum in at least fp32, as PEFT does.

    Args:
        W0: (O, I) in any floating dtype; (I, O) where it is stored `transposed`.
        A: (R, I).
        B: (O, R).
        scaling: s.
        transposed: See W0.

    Returns:
        n (O,).
    """
    dtype = torch.promote_types(A.dtype, adapter_dtype(W0.dtype))
    left, right, dim = (A.t(), B.t(), 0) if transposed else (B, A, 1)

    def norms(W0: Tensor, left: Tensor) -> Tensor:
        if left.dtype == dtype:
            V = torch.addmm(cast(W0, dtype), left, right, alpha=scaling)
        else:  # adapters in half precision: rounding the update to it changes n by some 1e-5
            V = torch.add(cast(W0, dtype), left @ right, alpha=scaling)
        return torch.linalg.vector_norm(V, dim=dim)

    if torch.compiler.is_compiling() or W0.device.type != "cpu" or W0.numel() <= BLOCK:
        return norms(W0, left)
    concurrency = max(1, BLOCK // W0.shape[1])
    found = [norms(*part) for part in zip(W0.split(concurrency), left.split(concurrency), strict=True)]
    return torch.linalg.vector_norm(torch.stack(found), dim=0) if transposed else torch.cat(found)

"""The adapted layer as one differentiable product: what training on a processor, and fp32 anywhere, runs.

With G = t g and the low-rank branch x -> h = x A^T -> h (G s B)^T, the layer's output has two forms:

    merged   y = x W(t)^T + b                                    one product, once W(t) has been built
    split    y = e x W0^T + sum_k h_k (G_k s_k B_k)^T + b        W0 as it is, e = 1 + sum_k t_k (g_k - 1)

and one gradient, in which the one product of size T O I is the gradient of x: dA, dB and dm are thin products and sums.

Of token size x, y and (T, R) tensors are kept for the backward pass, of parameter size at most one W(t).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_mm.core.convolution import ConvProduct
from dora_mm.core.corrected import CORRECTED, can_correct, changes_little
from dora_mm.core.few_tokens import FEW_TOKENS, MOST_TOKENS, TRANSPOSING_PAYS
from dora_mm.core.form import stays_split
from dora_mm.core.functional import (
    Adapter,
    RowGains,
    adapter_dtype,
    any_nonzero,
    as_matrix,
    exact_norm_correction,
    merge_adapters,
    product_dtype,
    row_gains,
    row_norm,
)
from dora_mm.core.products import LINEAR, LinearProduct, Product, like_tokens

STACKS_FROM = 16  # tokens for each row of A that their product takes along: a sixteenth more of it at most


@dataclass
class Prepared:
    """What depends on parameters alone, for products in one dtype (see `product_dtype`); found at its first use.

    n0: the row norms of a weight that is known not to have changed. num_passes: how many passes this serves.
    operand: what x is multiplied with in the merged form: W(t), in half precision rounded. low: what that leaves of it.
    """

    n0: Tensor | None = None
    num_passes: float = 1.0
    rows: tuple[RowGains, ...] | None = None
    operand: Tensor | None = None
    low: Tensor | None = None


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    *,
    product: Product = LINEAR,
    dropout: float = 0.0,
    prepared: Prepared | None = None,
    keep_weight: bool = True,
    save_output: bool = True,
    dtype: torch.dtype | None = None,
    restore: Callable[[], Tensor] | None = None,
) -> Tensor:
    """y = x W(t)^T + b in the dtype that the base layer would return, autocast included.

    dropout: drops entries of x in the update alone, as the official layer does: x W0^T + drop(x) (W(t) - W0)^T + b,
        which without a magnitude is the split form with h = drop(x) A^T.
    prepared: what this function keeps from one pass to the next; without it the parameters are read as they are.
    keep_weight: whether W(t), where it is built, is kept for the backward pass and inside `prepared`, or built again.
    save_output: whether y may be kept for the backward pass. Without it dm costs a product of size T O I more; an
        output that the next operation overwrites needs that.
    dtype: that of the product, without autocast, where it is not the weight's.
    restore: gives the weight again in the backward pass, for one that was made for this pass and is not to be kept.
    """
    autocast = torch.is_autocast_enabled(weight.device.type)
    casts = autocast or dtype is not None
    if autocast or dtype is None:
        dtype = weight.dtype if product.always_splits else product_dtype(weight)  # autocast leaves embeddings alone
    if casts and x.is_floating_point():
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    prepared = prepared or Prepared()
    with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
        dropped = F.dropout(x, dropout) if dropout else None
        thin = dropped is None or all(a.magnitude is None for a in adapters)
        product = CORRECTED if thin and can_correct(x, dtype, product) else product
        num_passes = prepared.num_passes if keep_weight else 1
        if dropped is None:
            split = stays_split(x, weight, adapters, product, num_passes, dtype)
        else:
            split = thin and (dtype.itemsize >= 4 or product.splits_half)
        if split and product is CORRECTED:
            n0 = row_norm(weight.detach()) if prepared.n0 is None else prepared.n0
            prepared.rows = prepared.rows or find_row_gains(weight, adapters, product, n0)
            split = changes_little(n0, base_gain(adapters, prepared.rows), adapters, prepared.rows)
        operand, low = None, None
        if split and may_sum_in_another_order(x, adapters, product):
            assert isinstance(product, LinearProduct)
            product = FEW_TOKENS if TRANSPOSING_PAYS and product.num_tokens(x, weight) <= MOST_TOKENS else product
            operand = base_output(product, x, weight, adapters, prepared)
        if dropped is None and not split:
            operand, low = merge(prepared, weight, adapters, dtype, keep_weight)
        if prepared.rows is None:
            prepared.rows = find_row_gains(weight, adapters, product, prepared.n0)
        bare = tuple(a.holding(None, None, None) for a in adapters)
        call = Call(product, dtype, bare, prepared.rows, split, keep_weight, save_output, restore)
        return _AdaptedProduct.apply(
            call, x, dropped, weight, bias, operand, low, *(t for a in adapters for t in (a.A, a.B, a.magnitude))
        )


def find_row_gains(
    weight: Tensor, adapters: Sequence[Adapter], product: Product, n0: Tensor | None
) -> tuple[RowGains, ...]:
    if n0 is None and any(a.magnitude is not None for a in adapters):
        n0 = row_norm(weight.detach())
    return tuple(product.rows(weight, adapter, n0) for adapter in adapters)


def may_sum_in_another_order(x: Tensor, adapters: Sequence[Adapter], product: Product) -> bool:
    """Whether x W0^T may come out of another product than the base layer's: with a fresh adapter no bit may change."""
    if type(product) is not LinearProduct or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    return any(a.B is not None and any_nonzero(a.B) for a in adapters)


@torch.no_grad()
def base_output(
    product: LinearProduct, x: Tensor, weight: Tensor, adapters: Sequence[Adapter], prepared: Prepared
) -> Tensor:
    """x W0^T for `complete`. W0 A^T, which the norm needs, comes out of the same product where that pays."""
    A = adapters[0].A if len(adapters) == 1 and adapters[0].magnitude is not None else None
    stacks = A is not None
    if product is FEW_TOKENS:  # has the same bits with A and without
        stacks = stacks and prepared.rows is None and prepared.num_passes <= 1
    elif A is not None:  # in every pass or in none: a checkpointed pass that is made again has to give the same bits
        stacks = product.num_tokens(x, weight) >= STACKS_FROM * len(A)
    base, W0A = product.base(x, weight, A if stacks else None)
    if stacks and prepared.rows is None:
        prepared.rows = (row_gains(weight, adapters[0], prepared.n0, W0A),)
    return base


# --- the two forms ---------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the forward and the backward pass share beside tensors. adapters: without their A, B and m."""

    product: Product
    dtype: torch.dtype  # of the products
    adapters: tuple[Adapter, ...]
    rows: tuple[RowGains, ...]
    split: bool
    keep_weight: bool
    save_output: bool
    restore: Callable[[], Tensor] | None


def merge(
    prepared: Prepared, weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(operand, low) of `Prepared`, left there where `keep` is set, as the rows are in any case."""
    if prepared.operand is not None:
        return prepared.operand, prepared.low
    W, prepared.rows = merge_adapters(weight, adapters, prepared.rows)
    operand, low = as_operand(W, weight, dtype)
    if keep:
        prepared.operand, prepared.low = operand, low
    return operand, low


@torch.no_grad()
def as_operand(W: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W(t) in `dtype`, and what that leaves of it, None for nothing; W is overwritten.

    In half precision W(t) may not be rounded to one number: a bf16 base lies on the bf16 grid, so an update below half
    a unit in the last place would vanish. It becomes high + low, and x meets both in a sum that is rounded once.
    """
    if dtype == W.dtype:
        return W, None
    if dtype != weight.dtype:  # autocast: the base multiplies with cast(W0), and a fresh adapter must change no bit
        W = W + (weight.detach().to(dtype).to(W.dtype) - weight.detach())
    high = torch.empty_like(weight, dtype=dtype).copy_(W)
    W.sub_(high)
    return (high.contiguous(), W.to(dtype)) if residual_is_needed(W) else (high, None)


def update_weight(weight: Tensor, adapters: Sequence[Adapter], rows: Sequence[RowGains], dtype: torch.dtype) -> Tensor:
    """W(t) - W0, in `dtype`."""
    W, _ = merge_adapters(weight, adapters, rows)
    return (W - weight.detach()).to(dtype)


def dropout_output(
    product: Product, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor
) -> Tensor:
    """x W0^T + dropped delta^T + b. In half precision in one sum: a correction to a rounded product would be lost."""
    base = weight.detach().to(x.dtype)
    if not residual_is_needed(delta):
        return product(x, base, bias)
    if x.dtype.itemsize < 4:
        return product.concatenated(x, base, dropped, delta, bias)
    return product(x, base, bias).add_(product(dropped, delta, None))


def update_grad_input(
    call: Call,
    dY: Tensor,
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    low: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """dY (W(t) - W0), or the sum of u A over (u, A): what reaches `dropped` through the update."""
    if not call.split:
        return call.product.grad_input(dY, x, update_weight(weight, adapters, call.rows, dY.dtype))
    found = torch.zeros_like(x)
    for u, A in low:
        found = call.product.add_reduced_grad(found, u, x, A.to(u.dtype))
    return found


def base_gain(adapters: Sequence[Adapter], found: Sequence[RowGains]) -> Tensor | None:
    """e = 1 + sum_k t_k (g_k - 1), (O,): what the split form scales x W0^T with; None for 1."""
    gain = None
    for adapter, rows in zip(adapters, found, strict=True):
        if rows.gain is not None:
            part = rows.gain if adapter.strength == 1 else 1 + adapter.strength * (rows.gain - 1)
            gain = part if gain is None else gain + (part - 1)
    return gain


def scale_rows(t: Tensor, adapter: Adapter, rows: RowGains) -> Tensor:
    """t g s times an (O, R) tensor."""
    factor = adapter.scaling * adapter.strength
    if rows.gain is None:
        return t if factor == 1 else t * factor
    return t * (rows.gain if factor == 1 else rows.gain * factor)[:, None]


# --- the operator ----------------------------------------------------------------------------------------------------


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x, dropped, weight, bias, operand, low, *tensors):
        adapters = with_tensors(call.adapters, tensors)
        hs: list[Tensor | None] = [None] * len(adapters)
        met = x if dropped is None else dropped  # what the update is multiplied with
        if dropped is not None and not call.split:
            delta = update_weight(weight, adapters, call.rows, x.dtype)
            y = dropout_output(call.product, x, dropped, weight, bias, delta)
        elif call.split:
            low_dtype = adapter_dtype(call.dtype) if call.product.always_splits else call.dtype
            hs = [None if a.A is None else call.product.reduce(met, a.A.to(low_dtype)) for a in adapters]
            branches = [
                (h, scale_rows(adapter.B, adapter, rows))
                for h, adapter, rows in zip(hs, adapters, call.rows, strict=True)
                if h is not None and adapter.B is not None
            ]
            gain = base_gain(call.adapters, call.rows)
            if operand is None:
                y = call.product.split(x, weight.detach().to(call.dtype), bias, gain, branches)
            else:
                y = like_tokens(call.product.complete(operand, bias, gain, branches), x)
        elif low is None:
            y = call.product(x, operand, bias)
        else:
            y = call.product.concatenated(x, operand, x, low, bias)
        y = y.data  # no view of anything: the next operation may overwrite what this one returns
        trained = any(ctx.needs_input_grad[7:])
        from_output = any(ctx.needs_input_grad[9::3]) and output_is_inner(call, dropped)
        ctx.call, ctx.has_dropout = call, dropped is not None
        ctx.save_for_backward(
            # a convolution's dX asks for x's sizes, and so does that of the update
            met if trained or dropped is not None or isinstance(call.product, ConvProduct) else None,
            y if from_output else None,
            None if call.split or not call.keep_weight else operand,
            *(weight if call.restore is None else None, bias, *hs, *tensors),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        call, needs = ctx.call, ctx.needs_input_grad
        if needs[3]:
            raise ValueError("the weight of an adapted layer has no gradient: leave its requires_grad False")
        x, y, operand, weight, bias, *rest = ctx.saved_tensors
        weight = weight if call.restore is None else call.restore()
        count = len(call.adapters)
        hs, adapters = rest[:count], with_tensors(call.adapters, rest[count:])
        dY = grad_outputs[0]
        gradients: list[Tensor | None] = []
        us = []
        for k, (adapter, rows, h) in enumerate(zip(adapters, call.rows, hs, strict=True)):
            own = AdapterGradients(call.product, adapter, rows, weight, bias, x, y, dY)
            needs_u = call.split and needs[2 if ctx.has_dropout else 1]
            *found, u = own.compute(h, needs[7 + 3 * k : 10 + 3 * k], needs_u)
            gradients += found
            us.append(u)
        low = [(u, a.A) for u, a in zip(us, adapters, strict=True) if u is not None and a.A is not None]
        dX = d_dropped = None
        if ctx.has_dropout:
            dX = call.product.grad_input(dY, x, weight.detach().to(dY.dtype)) if needs[1] else None
            d_dropped = update_grad_input(call, dY, x, weight, adapters, low) if needs[2] else None
        elif needs[1] and call.split:
            gain = base_gain(call.adapters, call.rows)
            dX = call.product.split_grad_input(dY, x, weight.detach().to(call.dtype), gain, low)
        elif needs[1]:
            if operand is None:
                operand = as_operand(merge_adapters(weight, adapters, call.rows)[0], weight, dY.dtype)[0]
            dX = call.product.grad_input(dY, x, operand)  # without low: half precision rounds dX to as much anyway
        db = call.product.token_sum(dY).to(bias.dtype) if needs[4] else None
        return None, dX, d_dropped, None, db, None, None, *gradients


def with_tensors(adapters: Sequence[Adapter], tensors: Sequence[Tensor | None]) -> list[Adapter]:
    return [a.holding(*tensors[3 * k : 3 * k + 3]) for k, a in enumerate(adapters)]


def output_is_inner(call: Call, dropped: Tensor | None) -> bool:
    """Whether dm may be taken from y: (y - b) / g is x V^T with one adapter at strength 1."""
    alone = len(call.adapters) == 1 and call.adapters[0].strength == 1 and dropped is None
    return alone and call.save_output and call.product.chooses_rows()


# --- the gradients of one adapter ------------------------------------------------------------------------------------


class AdapterGradients(NamedTuple):
    """x: what the update is multiplied with, dropout applied. y: the output, None where dm may not be taken from it."""

    product: Product
    adapter: Adapter
    rows: RowGains
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor | None
    dY: Tensor

    def compute(self, h: Tensor | None, wanted: Sequence[bool], needs_u: bool):
        """(dA, dB, dm, u), None where it is neither wanted nor needed for another."""
        product, adapter, rows, dtype = self.product, self.adapter, self.rows, self.dY.dtype
        A, B = adapter.A, adapter.B
        if A is None or B is None:
            return None, None, self.magnitude() if wanted[2] else None, None
        trained = wanted[0] or wanted[1]
        u = product.grad_h(self.dY, scale_rows(B, adapter, rows).to(dtype)) if trained or needs_u else None
        if u is None or not trained:
            return None, None, self.magnitude() if wanted[2] else None, u
        h = product.reduce(self.x, A.to(dtype)) if h is None else h.to(dtype)
        dA = product.grad_A(u, self.x, A).to(A.dtype)
        dB = product.grad_B(self.dY, h, B).to(B.dtype, memory_format=torch.contiguous_format)
        dB = scale_rows(dB, adapter, rows)
        if rows.gain is None:
            return dA, dB, None, u
        dm = self.magnitude() if wanted[2] or adapter.norm_grad == "exact" else None
        if dm is not None and adapter.norm_grad == "exact":
            more_A, more_B = exact_norm_correction(as_matrix(self.weight), adapter, rows, dm)
            dA, dB = dA.add_(more_A), dB.add_(more_B)
        return dA, dB, dm, u

    def magnitude(self) -> Tensor:
        """dm = t rowsum(dY * x V^T) / n, 0 where n is 0: from y where that is there, else by a product with V."""
        if self.y is not None:
            return self.product.magnitude_grad(self.dY, self.x, self.y, self.weight, self.bias, self.adapter, self.rows)
        dots = self.product.inner_dots(self.dY, self.x, self.weight, self.adapter)
        assert self.rows.norm is not None
        return (self.adapter.strength * dots / self.rows.norm).masked_fill_(self.rows.norm == 0, 0)


def residual_is_needed(low: Tensor) -> bool:
    """Whether the low part is needed. A further part may change the order of summation (in bf16, 640 x 640 with 2048
    tokens), so a fresh adapter goes without it. A compiled graph cannot branch on values."""
    return torch.compiler.is_compiling() or any_nonzero(low)


Forward = Callable[..., Tensor]  # one implementation of the layer, with the signature of `adapted_product`
TORCH: Forward = adapted_product

"""The adapted layer as one differentiable product: what training on a CPU, and in fp32 on any device, runs.

With G = t g and the low-rank branch x -> h = x A^T -> h (G s B)^T, the layer's output has two forms:

    merged   y = x W(t)^T + b                                    one product, once W(t) has been built
    split    y = e x W0^T + sum_k h_k (G_k s_k B_k)^T + b        W0 itself, e = 1 + sum_k t_k (g_k - 1)

and one gradient, in which only the gradient of x is a product of size T O I: dA, dB and dm are thin products and sums.

Kept for the backward pass are x, y and (T, R) tensors, and of the weight's size at most one W(t).
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

STACKS_FROM = 16  # tokens per row of A from which A is appended to x: the product grows by a sixteenth at most


@dataclass
class Prepared:
    """What depends only on the parameters, for products in one dtype (see `product_dtype`). Filled on first use.

    Attributes:
        n0: The row norms of the weight (O,), where it is known not to have changed.
        num_passes: How many forward passes this serves; may be infinite.
        rows: n and g of every adapter.
        operand: What x is multiplied by in the merged form: W(t) in the dtype of the product, shaped like the weight.
        residual: W(t) - operand in the dtype of the product, shaped like the weight; None where it is 0.
    """

    n0: Tensor | None = None
    num_passes: float = 1.0
    rows: tuple[RowGains, ...] | None = None
    operand: Tensor | None = None
    residual: Tensor | None = None


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
    """Computes y = x W(t)^T + b, differentiable in x, the bias and the tensors of the adapters.

    Args:
        x: Input of the layer: (..., I), (N, C, *positions) for a convolution, integers (...) for an embedding.
        weight: W0 (O, I), or a kernel (O, I / groups, *K). It gets no gradient.
        bias: b (O,), or None.
        adapters: The adapters, each with its strength.
        product: The operation of the layer.
        dropout: Probability of dropping entries of x in the update only, as the official layer does:
            x W0^T + drop(x) (W(t) - W0)^T + b. Without a magnitude this is the split form with h = drop(x) A^T.
        prepared: What is kept from one pass to the next; without it, the parameters are read in every pass.
        keep_weight: Whether W(t), where it is built, is kept for the backward pass and in `prepared`, or built again.
        save_output: Whether y may be kept for the backward pass. It must be False where the next operation overwrites
            y; dm then costs one more product of size T O I.
        dtype: The dtype of the product outside autocast, where it is not that of the weight.
        restore: Returns the weight again in the backward pass, for a weight that was made for this pass and must not be
            kept.

    Returns:
        y (..., O), or (N, O, *positions), in the dtype that the base layer would return, autocast included.

    Raises:
        ValueError: In the backward pass, where the weight requires a gradient.
    """
    autocast = torch.is_autocast_enabled(weight.device.type)
    casts = autocast or dtype is not None
    if autocast or dtype is None:
        dtype = weight.dtype if product.always_splits else product_dtype(weight)  # not autocast for embeddings
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
        operand, residual = None, None
        if split and may_sum_in_another_order(x, adapters, product):
            assert isinstance(product, LinearProduct)
            product = FEW_TOKENS if TRANSPOSING_PAYS and product.num_tokens(x, weight) <= MOST_TOKENS else product
            operand = base_output(product, x, weight, adapters, prepared)
        if dropped is None and not split:
            operand, residual = merge(prepared, weight, adapters, dtype, keep_weight)
        if prepared.rows is None:
            prepared.rows = find_row_gains(weight, adapters, product, prepared.n0)
        settings = tuple(a.holding(None, None, None) for a in adapters)
        call = Call(product, dtype, settings, prepared.rows, split, keep_weight, save_output, restore)
        return _AdaptedProduct.apply(
            call, x, dropped, weight, bias, operand, residual, *(t for a in adapters for t in (a.A, a.B, a.magnitude))
        )


def find_row_gains(
    weight: Tensor, adapters: Sequence[Adapter], product: Product, n0: Tensor | None
) -> tuple[RowGains, ...]:
    """Computes n and g of every adapter. `n0` (O,) as in `Product.rows`."""
    if n0 is None and any(a.magnitude is not None for a in adapters):
        n0 = row_norm(weight.detach())
    return tuple(product.rows(weight, adapter, n0) for adapter in adapters)


def may_sum_in_another_order(x: Tensor, adapters: Sequence[Adapter], product: Product) -> bool:
    """Whether x W0^T may be computed differently than in the base layer: a fresh adapter must not change any bit."""
    if type(product) is not LinearProduct or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    return any(a.B is not None and any_nonzero(a.B) for a in adapters)


@torch.no_grad()
def base_output(
    product: LinearProduct, x: Tensor, weight: Tensor, adapters: Sequence[Adapter], prepared: Prepared
) -> Tensor:
    """Returns x W0^T (T, O) for `complete`; W0 A^T, which the norm needs, comes from the same product where it pays."""
    A = adapters[0].A if len(adapters) == 1 and adapters[0].magnitude is not None else None
    stacks = A is not None
    if product is FEW_TOKENS:  # it gives the same bits with and without A
        stacks = stacks and prepared.rows is None and prepared.num_passes <= 1
    elif A is not None:  # in every pass or in none: a checkpointed pass must give the same bits when it is repeated
        stacks = product.num_tokens(x, weight) >= STACKS_FROM * len(A)
    base, W0A = product.base(x, weight, A if stacks else None)
    if stacks and prepared.rows is None:
        prepared.rows = (row_gains(weight, adapters[0], prepared.n0, W0A),)
    return base


# --- the two forms ---------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the forward and the backward pass share, in addition to tensors."""

    product: Product
    dtype: torch.dtype  # of the products
    adapters: tuple[Adapter, ...]  # without their A, B and magnitude
    rows: tuple[RowGains, ...]
    split: bool
    keep_weight: bool
    save_output: bool
    restore: Callable[[], Tensor] | None


def merge(
    prepared: Prepared, weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns operand and residual (see `Prepared`). They stay in `prepared` with `keep`; `rows` always do."""
    if prepared.operand is not None:
        return prepared.operand, prepared.residual
    W, prepared.rows = merge_adapters(weight, adapters, prepared.rows)
    operand, residual = as_operand(W, weight, dtype)
    if keep:
        prepared.operand, prepared.residual = operand, residual
    return operand, residual


@torch.no_grad()
def as_operand(W: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Returns W(t) rounded to `dtype` and the residual, None where it is 0. W is overwritten.

    In half precision one number is not enough for W(t): a bf16 base lies on the bf16 grid, so an update below half a
    unit in the last place would vanish. W(t) becomes a sum of two numbers, and the sum of their products with x is
    rounded once.
    """
    if dtype == W.dtype:
        return W, None
    if dtype != weight.dtype:  # autocast: the base multiplies by cast(W0), and a fresh adapter must not change any bit
        W = W + (weight.detach().to(dtype).to(W.dtype) - weight.detach())
    rounded = torch.empty_like(weight, dtype=dtype).copy_(W)
    residual = W.sub_(rounded)
    return (rounded.contiguous(), residual.to(dtype)) if residual_is_needed(residual) else (rounded, None)


def update_weight(weight: Tensor, adapters: Sequence[Adapter], rows: Sequence[RowGains], dtype: torch.dtype) -> Tensor:
    """Returns W(t) - W0 in `dtype`, shaped like the weight."""
    W, _ = merge_adapters(weight, adapters, rows)
    return (W - weight.detach()).to(dtype)


def dropout_output(
    product: Product, x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor
) -> Tensor:
    """Returns x W0^T + dropped delta^T + b.

    In half precision it is one sum: a correction to a product that is rounded already would be lost.
    """
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
    branches: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Returns the gradient of `dropped`: dY (W(t) - W0), or the sum of u A over the branches (u, A)."""
    if not call.split:
        return call.product.grad_input(dY, x, update_weight(weight, adapters, call.rows, dY.dtype))
    found = torch.zeros_like(x)
    for u, A in branches:
        found = call.product.add_reduced_grad(found, u, x, A.to(u.dtype))
    return found


def base_gain(adapters: Sequence[Adapter], found: Sequence[RowGains]) -> Tensor | None:
    """Returns e = 1 + sum_k t_k (g_k - 1), (O,), which scales x W0^T in the split form; None for 1."""
    gain = None
    for adapter, rows in zip(adapters, found, strict=True):
        if rows.gain is not None:
            part = rows.gain if adapter.strength == 1 else 1 + adapter.strength * (rows.gain - 1)
            gain = part if gain is None else gain + (part - 1)
    return gain


def scale_rows(t: Tensor, adapter: Adapter, rows: RowGains) -> Tensor:
    """Multiplies a tensor (O, R) by strength, gain and scaling of the adapter."""
    factor = adapter.scaling * adapter.strength
    if rows.gain is None:
        return t if factor == 1 else t * factor
    return t * (rows.gain if factor == 1 else rows.gain * factor)[:, None]


# --- the operator ----------------------------------------------------------------------------------------------------


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x, dropped, weight, bias, operand, residual, *tensors):
        adapters = with_tensors(call.adapters, tensors)
        hs: list[Tensor | None] = [None] * len(adapters)
        update_input = x if dropped is None else dropped
        if dropped is not None and not call.split:
            delta = update_weight(weight, adapters, call.rows, x.dtype)
            y = dropout_output(call.product, x, dropped, weight, bias, delta)
        elif call.split:
            h_dtype = adapter_dtype(call.dtype) if call.product.always_splits else call.dtype
            hs = [None if a.A is None else call.product.reduce(update_input, a.A.to(h_dtype)) for a in adapters]
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
        elif residual is None:
            y = call.product(x, operand, bias)
        else:
            y = call.product.concatenated(x, operand, x, residual, bias)
        y = y.data  # not a view to autograd: the next operation may overwrite it
        trained = any(ctx.needs_input_grad[7:])
        from_output = any(ctx.needs_input_grad[9::3]) and output_is_inner(call, dropped)
        ctx.call, ctx.has_dropout = call, dropped is not None
        ctx.save_for_backward(
            # dX of a convolution and of the update need the shape of x
            update_input if trained or dropped is not None or isinstance(call.product, ConvProduct) else None,
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
            raise ValueError("the weight of an adapted layer gets no gradient: set its requires_grad to False")
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
        branches = [(u, a.A) for u, a in zip(us, adapters, strict=True) if u is not None and a.A is not None]
        dX = d_dropped = None
        if ctx.has_dropout:
            dX = call.product.grad_input(dY, x, weight.detach().to(dY.dtype)) if needs[1] else None
            d_dropped = update_grad_input(call, dY, x, weight, adapters, branches) if needs[2] else None
        elif needs[1] and call.split:
            gain = base_gain(call.adapters, call.rows)
            dX = call.product.split_grad_input(dY, x, weight.detach().to(call.dtype), gain, branches)
        elif needs[1]:
            if operand is None:
                operand = as_operand(merge_adapters(weight, adapters, call.rows)[0], weight, dY.dtype)[0]
            dX = call.product.grad_input(
                dY, x, operand
            )  # without the residual: half precision rounds dX by as much anyway
        db = call.product.token_sum(dY).to(bias.dtype) if needs[4] else None
        return None, dX, d_dropped, None, db, None, None, *gradients


def with_tensors(adapters: Sequence[Adapter], tensors: Sequence[Tensor | None]) -> list[Adapter]:
    return [a.holding(*tensors[3 * k : 3 * k + 3]) for k, a in enumerate(adapters)]


def output_is_inner(call: Call, dropped: Tensor | None) -> bool:
    """Whether dm may be computed from y: with one adapter at strength 1, (y - b) / g is x V^T."""
    is_single = len(call.adapters) == 1 and call.adapters[0].strength == 1 and dropped is None
    return is_single and call.save_output and call.product.chooses_rows()


# --- the gradients of one adapter ------------------------------------------------------------------------------------


class AdapterGradients(NamedTuple):
    """What the gradients of one adapter depend on."""

    product: Product
    adapter: Adapter
    rows: RowGains
    weight: Tensor
    bias: Tensor | None
    x: Tensor  # with dropout applied
    y: Tensor | None  # None where dm may not be computed from it
    dY: Tensor

    def compute(self, h: Tensor | None, wanted: Sequence[bool], needs_u: bool):
        """Returns dA, dB, dm and u, each None where it is neither wanted nor needed for another.

        Args:
            h: x A^T, where it was kept.
            wanted: Whether dA, dB and dm are wanted.
            needs_u: Whether u is needed for the gradient of x.
        """
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
        """Returns dm = t rowsum(dY * x V^T) / n, 0 where n is 0: from y if it was kept, else by a product with V."""
        if self.y is not None:
            return self.product.magnitude_grad(self.dY, self.x, self.y, self.weight, self.bias, self.adapter, self.rows)
        dots = self.product.inner_dots(self.dY, self.x, self.weight, self.adapter)
        assert self.rows.norm is not None
        return (self.adapter.strength * dots / self.rows.norm).masked_fill_(self.rows.norm == 0, 0)


def residual_is_needed(residual: Tensor) -> bool:
    """Whether the residual has to be multiplied too.

    With it the order of summation may change (it does in bf16 for 640 x 640 with 2048 tokens), so a fresh adapter goes
    without it. A compiled graph cannot branch on values.
    """
    return torch.compiler.is_compiling() or any_nonzero(residual)


Forward = Callable[..., Tensor]  # an implementation of the layer, with the signature of `adapted_product`
TORCH: Forward = adapted_product

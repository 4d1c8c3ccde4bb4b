"""The two forms of the adapted layer, on every device, and the function that chooses between them.

    merged      y = x W(t)^T + b                        W(t) is built, and multiplies once
    unmerged    y = e x W0^T + h B'^T + b               W0 itself, and the low-rank branches of all adapters as one

with h = x [A_1; A_2; ...]^T and B' = [t_1 g_1 s_1 B_1, t_2 g_2 s_2 B_2, ...]. Each is one autograd.Function. The
gradients of A, B and m are the same in both: products with R columns, and sums. Only dX is a product of size T O I.

Dropout drops entries of x in the update only, as the official layer does: y = x W0^T + drop(x) (W(t) - W0)^T + b. In
the merged form that is a second product beside the one with W0. The unmerged form, with h = drop(x) A^T, can do it
without a magnitude.

In half precision W(t) does not fit into one number. The merged form then multiplies x by two weights whose sum it is
(see `MergedWeight`), in one product that is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_mm.core.functional import (
    Adapter,
    RowGains,
    adapter_dtype,
    any_nonzero,
    as_matrix,
    autocasts,
    can_read,
    exact_norm_correction,
    merge_adapters,
    product_dtype,
    row_norm,
    without_autocast,
)
from dora_mm.core.ops import sum_tokens
from dora_mm.core.passes import Call, Kept, MergedWeight, Options, Saved, load, save, scaled
from dora_mm.core.steps import TORCH_STEPS, Steps, inner_dots

# --- which form ------------------------------------------------------------------------------------------------------

# What the passes of either form over memory cost, in multiplications of a large product, on two cores of an AMD EPYC in
# fp32. Where the memory of one W(t) is reused for the next, building costs 16. But in a model the W(t) of all layers
# exist at once, and the system allocates their pages again in every step: a UNet of 2.6 billion weights at 512 px with
# checkpointing takes 1.08 times PEFT LoRA's time and 2.7 GB for W(t) if BUILD_COST is 16, 1.01 times and 0.4 GB at 100.
BUILD_COST = 100  # per entry of W(t): W0 copied, added to, scaled, and new memory for that
UNMERGED_COST = 48  # per entry of y: y scaled and added to, dY scaled


def choose_form(
    num_tokens: int,
    num_out: int,
    num_in: int,
    rank: int,
    *,
    half: bool = False,
    has_magnitude: bool = True,
    dropout: bool = False,
    num_passes: float = 1.0,
    rounds_once: bool = False,
) -> Literal["merged", "unmerged"]:
    """Chooses the form of a layer whose W(t) may be built. It depends on nothing that another pass leaves behind.

    (A checkpointed pass runs twice, and has to save the same tensors both times.)

    Args:
        num_tokens: T.
        num_out: O.
        num_in: I, for a convolution times the kernel's size.
        rank: The sum of the adapters' ranks.
        half: Whether the product runs in half precision.
        has_magnitude: Whether any adapter has a magnitude.
        dropout: Whether entries of x are dropped in the update.
        num_passes: How many forward passes one W(t) serves; infinite in inference.
        rounds_once: Whether the unmerged form rounds once in half precision (see `Steps`).
    """
    if dropout and has_magnitude:
        return "merged"  # either form has two large products, and this one rounds their sum once
    if half:
        return "unmerged" if rounds_once else "merged"
    build = num_out * num_in * (rank + BUILD_COST)
    unmerged = num_tokens * (rank * (num_out + num_in) + UNMERGED_COST * num_out)
    norm = num_out * num_in * rank if has_magnitude else 0  # W0 A^T; where W(t) is built, its norm is one pass
    return "unmerged" if dropout or num_passes * unmerged + norm < build else "merged"


# --- the weight of the merged form -----------------------------------------------------------------------------------


@torch.no_grad()
def split_weight(W: Tensor, weight: Tensor, dtype: torch.dtype, has_dropout: bool = False) -> MergedWeight:
    """Splits W(t) into two weights in `dtype`.

    A bf16 base lies on the bf16 grid, so an update below half a unit in the last place would vanish from one number.

    Args:
        W: W(t) in at least fp32; it may be overwritten.
        weight: W0.
        dtype: The dtype of the product.
        has_dropout: Whether the update has an input of its own: then the two are W0 and the update.
    """
    if has_dropout:
        main = weight.detach().to(dtype)
        rest = W - weight.detach()
    elif dtype == W.dtype:
        return MergedWeight(W, None)
    else:
        if dtype != weight.dtype:  # autocast: the base multiplies by cast(W0), and a fresh adapter changes no bit
            W = W + (weight.detach().to(dtype).to(W.dtype) - weight.detach())
        main = torch.empty_like(weight, dtype=dtype).copy_(W)  # in the layout of W0, for the base's bits
        rest = W.sub_(main)
    # A second product may change the order of summation (in bf16 for 640 x 640 with 2048 tokens it does): a fresh
    # adapter goes without it.
    if can_read(rest) and not any_nonzero(rest):
        return MergedWeight(main, None)
    return MergedWeight(main, rest.to(dtype))


# --- the two forms ---------------------------------------------------------------------------------------------------


class Unmerged(torch.autograd.Function):
    """y = e x W0^T + h B'^T + b, with h from `dropped` where that is given (e is then 1)."""

    @staticmethod
    def forward(ctx: Any, call: Call, x, dropped, weight, bias, *tensors):
        op, update_input = call.options.op, x if dropped is None else dropped
        A, B = call.branch(call.adapters_with(tensors))
        h = None
        if A is not None:
            h = op.reduce(update_input, A.to(call.dtype if op.merges else adapter_dtype(call.dtype)))
        y = call.steps.unmerged(op, x, weight.detach().to(call.dtype), bias, call.base_gain(), h, B)
        wants_dm = dropped is None and any(ctx.needs_input_grad[7::3])  # m of every adapter
        return save(ctx, call, y, wants_dm, update_input, h, weight, bias, *tensors)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor):
        _, needs_x, needs_dropped, _, needs_bias, *needs = ctx.needs_input_grad
        call, saved, (dY,) = ctx.call, load(ctx), grad_outputs
        gradients, u, A = adapter_gradients(call, saved, dY, needs, h=saved.extra, needs_u=needs_x or needs_dropped)
        dX = d_dropped = None
        if needs_dropped and u is not None and A is not None:
            zeros = dY.new_zeros(saved.x.shape)
            d_dropped = call.options.op.add_grad_reduced(zeros, u, saved.x, A.to(dY.dtype))
            u = A = None
        if needs_x:
            W0 = saved.weight.detach().to(call.dtype)
            dX = call.steps.unmerged_grad_input(call.options.op, dY, saved.x, W0, call.base_gain(), u, A)
        return None, dX, d_dropped, None, bias_grad(call, saved, dY) if needs_bias else None, *gradients


class Merged(torch.autograd.Function):
    """y = x main^T + x' rest^T + b, the weights as in `MergedWeight`; x' is `dropped` where that is given, else x."""

    @staticmethod
    def forward(ctx: Any, call: Call, x, dropped, weight, bias, main, rest, *tensors):
        op, update_input = call.options.op, x if dropped is None else dropped
        if rest is None:
            y = op(x, main, bias)
        elif main.dtype.itemsize < 4:  # one sum, rounded once
            y = op(op.concatenate(x, update_input), torch.cat([main, rest], 1), bias)
        else:
            y = op(x, main, bias).add_(op(update_input, rest, None))
        ctx.has_dropout = dropped is not None
        wants_dm = dropped is None and any(ctx.needs_input_grad[9::3])  # m of every adapter
        keeps = call.options.keep_weight and any(ctx.needs_input_grad[1:3])
        extra = (main if dropped is None else rest) if keeps else None
        return save(ctx, call, y, wants_dm, update_input, extra, weight, bias, *tensors)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor):
        _, needs_x, needs_dropped, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        call, saved, (dY,) = ctx.call, load(ctx), grad_outputs
        gradients, _, _ = adapter_gradients(call, saved, dY, needs)
        dX = d_update = None
        if needs_dropped or (needs_x and not ctx.has_dropout):
            W = saved.extra if saved.extra is not None else built_again(call, saved, ctx.has_dropout)
            d_update = call.options.op.grad_input(dY, saved.x, W)  # without `rest`: half precision rounds dX by as much
        if needs_x and ctx.has_dropout:
            dX = call.options.op.grad_input(dY, saved.x, saved.weight.detach().to(dY.dtype))
        dX, d_dropped = (dX, d_update) if ctx.has_dropout else (d_update, None)
        db = bias_grad(call, saved, dY) if needs_bias else None
        return None, dX, d_dropped, None, db, None, None, *gradients


def built_again(call: Call, saved: Saved, has_dropout: bool) -> Tensor:
    """Returns what the input of the update was multiplied by: W(t), or with dropout the update."""
    W, _ = merge_adapters(saved.weight, saved.adapters, call.gains)
    merged = split_weight(W, saved.weight, call.dtype, has_dropout)
    if not has_dropout:
        return merged.main
    return torch.zeros_like(merged.main) if merged.rest is None else merged.rest


# --- their gradients -------------------------------------------------------------------------------------------------


def adapter_gradients(
    call: Call, saved: Saved, dY: Tensor, needs: Sequence[bool], *, h: Tensor | None = None, needs_u: bool = False
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Computes the gradients of all adapters.

    Args:
        call: The pass.
        saved: What it saved.
        dY: Gradient of the output.
        needs: Whether A, B and m of every adapter need a gradient, as a flat list.
        h: x A^T of all adapters, where it was kept.
        needs_u: Whether u is needed for the gradient of x.

    Returns:
        dA, dB and dm of every adapter as a flat list, None where not needed; and u and A of all adapters, None where
        there are none.
    """
    op, wanted = call.options.op, call.adapters_with(needs)
    A, B = call.branch(saved.adapters)
    trains = any(w.A or w.B for w in wanted)
    u = dA = dB = None
    if B is not None and (trains or needs_u):
        u = op.grad_h(dY, B.to(dY.dtype))
    if u is not None and A is not None and B is not None and trains:
        h = op.reduce(saved.x, A.to(dY.dtype)) if h is None else h.to(dY.dtype)
        dA, dB = op.grad_A(u, saved.x, A), op.grad_B(dY, h, B)
    gradients: list[Tensor | None] = []
    first = 0
    for adapter, gains, wants in zip(saved.adapters, call.gains, wanted, strict=True):
        is_exact = adapter.norm_grad == "exact" and gains.norm is not None and dA is not None
        dm = magnitude_grad(call, saved, dY, adapter, gains) if wants.magnitude or is_exact else None
        own_A = own_B = None
        if dA is not None and dB is not None and adapter.A is not None and adapter.B is not None:
            last = first + len(adapter.A)
            own_A = dA[first:last].to(adapter.A.dtype)
            own_B = dB[:, first:last].to(adapter.B.dtype, memory_format=torch.contiguous_format)
            own_B = scaled(own_B, adapter, gains)
            first = last
            if is_exact and dm is not None:
                more_A, more_B = exact_norm_correction(as_matrix(saved.weight), adapter, gains, dm)
                own_A, own_B = own_A.add_(more_A), own_B.add_(more_B)
        gradients += [own_A, own_B, dm if wants.magnitude else None]
    return gradients, u, A


def magnitude_grad(call: Call, saved: Saved, dY: Tensor, adapter: Adapter, gains: RowGains) -> Tensor:
    """Returns dm = t sum over tokens of dY * (x V^T), / n; 0 where n is 0. It takes a product where y was not kept."""
    op = call.options.op
    if saved.y is not None:
        return call.steps.magnitude_grad(op, dY, saved.x, saved.y, saved.weight, saved.bias, adapter, gains)
    assert gains.norm is not None
    dots = inner_dots(op, dY, saved.x, saved.weight, adapter)
    return (adapter.strength * dots / gains.norm).masked_fill_(gains.norm == 0, 0)


def bias_grad(call: Call, saved: Saved, dY: Tensor) -> Tensor:
    """Returns db (O,)."""
    assert saved.bias is not None
    return sum_tokens(call.options.op, dY).to(saved.bias.dtype)


# --- the layer -------------------------------------------------------------------------------------------------------

# An implementation of the layer: `adapted_product`, or what calls it with other steps.
Forward = Callable[[Tensor, Tensor, Tensor | None, Sequence[Adapter], Options], Tensor]


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    options: Options,
    steps: Steps = TORCH_STEPS,
) -> Tensor:
    """Computes y = x W(t)^T + b, differentiable in x, the bias and the tensors of the adapters.

    Args:
        x: Input of the layer: (..., I), (N, C, *positions) for a convolution, integers (...) for an embedding.
        weight: W0 (O, I), or a kernel (O, I / groups, *K). It gets no gradient.
        bias: b (O,), or None.
        adapters: The adapters, each with its strength.
        options: The operation, dropout, and what is kept.
        steps: The implementation of the steps of the layer.

    Returns:
        y (..., O), or (N, O, *positions), in the dtype that the base layer would return, autocast included.

    Raises:
        ValueError: In the backward pass, where the weight requires a gradient.
    """
    autocast = autocasts(weight.device)
    dtype = weight.dtype
    if options.op.merges and (autocast or options.dtype is not None):  # embeddings are not autocast
        dtype = product_dtype(weight) if autocast or options.dtype is None else options.dtype
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    kept = options.kept or Kept()
    with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
        merges = form_of(x, weight, adapters, options, dtype, steps) == "merged"
        dropped = F.dropout(x, options.dropout) if options.dropout else None
        merged = kept.merged if dropped is None else None
        if merges and merged is None:
            W, kept.gains = merge_adapters(weight, adapters, kept.gains)
            merged = split_weight(W, weight, dtype, dropped is not None)
            if options.keep_weight and dropped is None:
                kept.merged = merged
        if kept.gains is None:
            norms = row_norm(weight.detach()) if kept.n0 is None and has_magnitude(adapters) else kept.n0
            kept.gains = tuple(steps.row_gains(weight, adapter, norms) for adapter in adapters)
        call = Call(options, steps, dtype, tuple(a.holding(None, None, None) for a in adapters), kept.gains)
        tensors = [t for a in adapters for t in (a.A, a.B, a.magnitude)]
        if not merges:
            return Unmerged.apply(call, x, dropped, weight, bias, *tensors)
        assert merged is not None
        return Merged.apply(call, x, dropped, weight, bias, *merged, *tensors)


TORCH: Forward = adapted_product


def form_of(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], options: Options, dtype: torch.dtype, steps: Steps
) -> Literal["merged", "unmerged"]:
    """`choose_form` for the tensors of a pass."""
    if not options.op.merges:
        return "unmerged"
    return choose_form(
        options.op.num_tokens(x, weight),
        weight.shape[0],
        weight[0].numel(),
        sum(0 if a.A is None else a.A.shape[0] for a in adapters),
        half=dtype.itemsize < 4,
        has_magnitude=has_magnitude(adapters),
        dropout=options.dropout > 0,
        num_passes=options.kept.num_passes if options.kept is not None and options.keep_weight else 1.0,
        rounds_once=steps.rounds_once,
    )


def has_magnitude(adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter has a magnitude."""
    return any(a.magnitude is not None for a in adapters)

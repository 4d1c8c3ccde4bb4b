"""The two forms of the adapted layer, on every device, and the function that chooses between them.

    merged      y = x W(t)^T + b                        W(t) is built, and multiplies once
    unmerged    y = e x W0^T + h B'^T + b               W0 itself, and the low-rank branches of all adapters as one

with h = x [A_1; A_2; ...]^T and B' = [t_1 g_1 s_1 B_1, t_2 g_2 s_2 B_2, ...]. Each is one autograd.Function. The
gradients of A, B and m are the same in both: products with R columns, and sums. Only dX is a product of size T O I.

Dropout drops entries of x in the update only, as the official layer does: y = x W0^T + drop(x) (W(t) - W0)^T + b. In
the merged form that is a second product beside the one with W0; without a magnitude, it is the unmerged form with h =
drop(x) A^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
    exact_norm_correction,
    merge_adapters,
    product_dtype,
    row_norm,
)
from dora_mm.core.ops import LINEAR, Op, sum_tokens
from dora_mm.core.steps import PLAIN, Kernels, inner_dots

# --- which form ------------------------------------------------------------------------------------------------------

# What the passes of either form over memory cost, in multiplications of a large product, on two cores of an AMD EPYC in
# fp32. Where the memory of one W(t) is reused for the next, building takes 16. But in a model the W(t) of all layers
# exist at once, and the system allocates their pages again in every step: the full-size SDXL UNet at 512 px with
# checkpointing takes 1.08 times PEFT LoRA's time and 2.7 GB with 16 here, 1.01 times and 0.4 GB with 100.
BUILD_COST = 100  # per entry of W(t): W0 copied, added to, scaled, and new memory for that
UNMERGED_COST = 48  # per entry of y: y scaled and added to, dY scaled


def choose_form(
    num_tokens: int,
    num_out: int,
    num_in: int,
    rank: int,
    *,
    half: bool = False,
    norm: bool = True,
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
        norm: Whether any adapter has a magnitude.
        dropout: Whether entries of x are dropped in the update.
        num_passes: How many forward passes one W(t) serves; infinite in inference.
        rounds_once: Whether the unmerged form rounds once in half precision (see `Kernels`).
    """
    if dropout and norm:
        return "merged"  # either form has two large products, and this one rounds their sum once
    if half:
        return "unmerged" if rounds_once else "merged"
    build = num_out * num_in * (rank + BUILD_COST)
    unmerged = num_tokens * (rank * (num_out + num_in) + UNMERGED_COST * num_out)
    factored_norm = num_out * num_in * rank if norm else 0  # W0 A^T; where W(t) is built, its norm is one pass
    return "unmerged" if dropout or num_passes * unmerged + factored_norm < build else "merged"


# --- the layer -------------------------------------------------------------------------------------------------------


class MergedWeight(NamedTuple):
    """Two weights whose sum is W(t), in the dtype of the product.

    Attributes:
        W: W(t), rounded where the dtype is half precision; or W0, where dropout gives the update an input of its own.
        R: What is missing from W(t), shaped like W; None where it is 0.
    """

    W: Tensor
    R: Tensor | None


@dataclass
class Kept:
    """What is kept of a layer from one pass to the next, for products in one dtype. `adapted_product` fills it.

    Attributes:
        n0: The row norms of the weight (O,), where it is known not to have changed.
        num_passes: How many forward passes this serves; may be infinite.
        rows: n and g of every adapter.
        merged: W(t).
    """

    n0: Tensor | None = None
    num_passes: float = 1.0
    rows: tuple[RowGains, ...] | None = None
    merged: MergedWeight | None = None


class Options(NamedTuple):
    """How a layer computes its product.

    Attributes:
        op: The operation of the layer.
        dropout: Probability of dropping entries of x in the update.
        keep_weight: Whether W(t), where it is built, is kept for the backward pass and in `kept`, or built again.
        save_output: Whether y may be kept for the backward pass; dm then costs no product of size T O I. It is not
            used where the next operation overwrote it.
        kept: What is kept from one pass to the next; without it, the parameters are read in every pass.
        dtype: The dtype of the product outside autocast, where it is not that of the weight.
        restore: Returns the weight again in the backward pass, where it was made for this pass and must not be kept.
    """

    op: Op = LINEAR
    dropout: float = 0.0
    keep_weight: bool = True
    save_output: bool = True
    kept: Kept | None = None
    dtype: torch.dtype | None = None
    restore: Callable[[], Tensor] | None = None


# An implementation of the layer: `adapted_product`, or what calls it with other kernels.
Forward = Callable[[Tensor, Tensor, Tensor | None, Sequence[Adapter], Options], Tensor]


def adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    options: Options,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """Computes y = x W(t)^T + b, differentiable in x, the bias and the tensors of the adapters.

    Args:
        x: Input of the layer: (..., I), (N, C, *positions) for a convolution, integers (...) for an embedding.
        weight: W0 (O, I), or a kernel (O, I / groups, *K). It gets no gradient.
        bias: b (O,), or None.
        adapters: The adapters, each with its strength.
        options: The operation, dropout, and what is kept.
        kernels: The implementation of the steps of the layer.

    Returns:
        y (..., O), or (N, O, *positions), in the dtype that the base layer would return, autocast included.

    Raises:
        ValueError: In the backward pass, where the weight requires a gradient.
    """
    autocast = torch.is_autocast_enabled(weight.device.type) and options.op.merges  # embeddings are not autocast
    dtype = product_dtype(weight) if autocast or options.dtype is None else options.dtype
    if not options.op.merges:
        dtype = weight.dtype
    elif autocast or options.dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    kept = options.kept or Kept()
    with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
        merges = form_of(x, weight, adapters, options, dtype, kernels) == "merged"
        dropped = F.dropout(x, options.dropout) if options.dropout else None
        merged = kept.merged if dropped is None else None
        if merges and merged is None:
            W, kept.rows = merge_adapters(weight, adapters, kept.rows)
            merged = split_weight(W, weight, dtype) if dropped is None else split_update(W, weight, dtype)
            kept.merged = merged if options.keep_weight and dropped is None else None
        if kept.rows is None:
            norms = row_norm(weight.detach()) if kept.n0 is None and has_norm(adapters) else kept.n0
            kept.rows = tuple(kernels.row_gains(weight, adapter, norms) for adapter in adapters)
        call = Call(options, kernels, dtype, tuple(a.holding(None, None, None) for a in adapters), kept.rows)
        tensors = [t for a in adapters for t in (a.A, a.B, a.magnitude)]
        if not merges:
            return Unmerged.apply(call, x, dropped, weight, bias, *tensors)
        assert merged is not None
        return Merged.apply(call, x, dropped, weight, bias, *merged, *tensors)


TORCH: Forward = adapted_product


def form_of(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], options: Options, dtype: torch.dtype, kernels: Kernels
) -> Literal["merged", "unmerged"]:
    """`choose_form` for the tensors of a pass."""
    if not options.op.merges:
        return "unmerged"
    return choose_form(
        options.op.num_tokens(x, weight),
        weight.shape[0],
        weight[0].numel(),
        sum(0 if a.A is None else a.A.shape[0] for a in adapters),
        half=dtype.itemsize < 4 or dtype != weight.dtype,
        norm=has_norm(adapters),
        dropout=options.dropout > 0,
        num_passes=options.kept.num_passes if options.kept is not None and options.keep_weight else 1.0,
        rounds_once=kernels.rounds_once,
    )


def has_norm(adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter has a magnitude."""
    return any(a.magnitude is not None for a in adapters)


@torch.no_grad()
def split_weight(W: Tensor, weight: Tensor, dtype: torch.dtype) -> MergedWeight:
    """Splits W(t), which is overwritten, into a number in `dtype` and the rest.

    In half precision one number is not enough: a bf16 base lies on the bf16 grid, so an update below half a unit in the
    last place would vanish. The products of x with the two numbers are one sum, which is rounded once.
    """
    if dtype == W.dtype:
        return MergedWeight(W, None)
    if dtype != weight.dtype:  # autocast: the base multiplies by cast(W0), and a fresh adapter must not change any bit
        W = W + (weight.detach().to(dtype).to(W.dtype) - weight.detach())
    rounded = torch.empty_like(weight, dtype=dtype).copy_(W)
    rest = W.sub_(rounded)
    return MergedWeight(rounded.contiguous(), rest.to(dtype)) if is_needed(rest) else MergedWeight(rounded, None)


@torch.no_grad()
def split_update(W: Tensor, weight: Tensor, dtype: torch.dtype) -> MergedWeight:
    """Splits W(t) into W0 and the update, in `dtype`: for x, and for what dropout leaves of x."""
    update = (W - weight.detach()).to(dtype)
    return MergedWeight(weight.detach().to(dtype), update if is_needed(update) else None)


def is_needed(rest: Tensor) -> bool:
    """Whether there is a second product: not for a fresh adapter, since it may change the order of summation.

    (In bf16 it does for 640 x 640 with 2048 tokens.) A compiled graph cannot branch on values.
    """
    return torch.compiler.is_compiling() or any_nonzero(rest)


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
        y = call.kernels.unmerged(op, x, weight.detach().to(call.dtype), bias, call.base_gain(), h, B)
        wants_dm = dropped is None and any(ctx.needs_input_grad[7::3])
        return save(ctx, call, y, wants_dm, update_input, h, weight, bias, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        _, needs_x, needs_dropped, _, needs_bias, *needs = ctx.needs_input_grad
        call, kept, (dY,) = ctx.call, saved(ctx), grad_outputs
        gradients, u, A = adapter_gradients(call, kept, dY, needs, h=kept.extra, needs_u=needs_x or needs_dropped)
        dX = d_dropped = None
        if needs_dropped and u is not None and A is not None:
            d_dropped = call.options.op.add_grad_reduced(torch.zeros_like(kept.x), u, kept.x, A.to(dY.dtype))
            u = A = None
        if needs_x:
            W0 = kept.weight.detach().to(call.dtype)
            dX = call.kernels.unmerged_grad_input(call.options.op, dY, kept.x, W0, call.base_gain(), u, A)
        return None, dX, d_dropped, None, kept.bias_grad(call, dY) if needs_bias else None, *gradients


class Merged(torch.autograd.Function):
    """y = x W^T + x' R^T + b, with W and R as in `MergedWeight`; x' is `dropped` where that is given, else x."""

    @staticmethod
    def forward(ctx: Any, call: Call, x, dropped, weight, bias, W, R, *tensors):
        op, update_input = call.options.op, x if dropped is None else dropped
        if R is None:
            y = op(x, W, bias)
        elif W.dtype.itemsize < 4:  # one sum, rounded once
            y = op(op.concatenate(x, update_input), torch.cat([W, R], 1), bias)
        else:
            y = op(x, W, bias).add_(op(update_input, R, None))
        multiplied = W if dropped is None else R
        ctx.has_dropout = dropped is not None
        wants_dm = dropped is None and any(ctx.needs_input_grad[9::3])
        extra = multiplied if call.options.keep_weight else None
        return save(ctx, call, y, wants_dm, update_input, extra, weight, bias, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        _, needs_x, needs_dropped, _, needs_bias, _, _, *needs = ctx.needs_input_grad
        call, kept, (dY,) = ctx.call, saved(ctx), grad_outputs
        gradients, _, _ = adapter_gradients(call, kept, dY, needs)
        dX = d_update = None
        if needs_dropped or (needs_x and not ctx.has_dropout):
            W = kept.extra if kept.extra is not None else built_again(call, kept, ctx.has_dropout)
            d_update = call.options.op.grad_input(dY, kept.x, W)  # R is left out: half precision rounds dX by as much
        if needs_x and ctx.has_dropout:
            dX = call.options.op.grad_input(dY, kept.x, kept.weight.detach().to(dY.dtype))
        dX, d_dropped = (dX, d_update) if ctx.has_dropout else (d_update, None)
        db = kept.bias_grad(call, dY) if needs_bias else None
        return None, dX, d_dropped, None, db, None, None, *gradients


def built_again(call: Call, kept: Saved, has_dropout: bool) -> Tensor:
    """Returns what the update's input was multiplied by: W(t), or with dropout the update."""
    W, _ = merge_adapters(kept.weight, kept.adapters, call.rows)
    if has_dropout:
        return (W - kept.weight.detach()).to(call.dtype)
    return split_weight(W, kept.weight, call.dtype).W


# --- what they share -------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A pass, without its tensors.

    Attributes:
        options: See `Options`.
        kernels: The implementation of the steps.
        dtype: The dtype of the product.
        adapters: The adapters without A, B and m.
        rows: n and g of every adapter.
    """

    options: Options
    kernels: Kernels
    dtype: torch.dtype
    adapters: tuple[Adapter, ...]
    rows: tuple[RowGains, ...]

    def adapters_with(self, flat: Sequence[Any]) -> list[Adapter]:
        """The adapters with A, B and m from a flat list: of tensors, or of whether they need a gradient."""
        return [a.holding(*flat[3 * k : 3 * k + 3]) for k, a in enumerate(self.adapters)]

    def base_gain(self) -> Tensor | None:
        """Returns e = 1 + sum_k t_k (g_k - 1), (O,); None for 1."""
        gain = None
        for adapter, rows in zip(self.adapters, self.rows, strict=True):
            if rows.gain is not None:
                part = rows.gain if adapter.strength == 1 else 1 + adapter.strength * (rows.gain - 1)
                gain = part if gain is None else gain + (part - 1)
        return gain

    def branch(self, adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None]:
        """Returns A and B' of all adapters, concatenated along the rank; None where none has them."""
        pairs = [
            (a.A, scale_rows(a.B, a, rows))
            for a, rows in zip(adapters, self.rows, strict=True)
            if a.A is not None and a.B is not None
        ]
        if len(pairs) <= 1:
            return pairs[0] if pairs else (None, None)
        A, B = zip(*pairs, strict=True)
        return torch.cat(A), torch.cat(B, 1)


def scale_rows(t: Tensor, adapter: Adapter, rows: RowGains) -> Tensor:
    """Multiplies a tensor (O, R) by strength, gain and scaling of the adapter."""
    factor = adapter.scaling * adapter.strength
    if rows.gain is None:
        return t if factor == 1 else t * factor
    return t * (rows.gain if factor == 1 else rows.gain * factor)[:, None]


class Saved(NamedTuple):
    """What a pass saved for its backward pass.

    Attributes:
        x: The input of the update: x, or what dropout leaves of it.
        y: The output; None where dm is not computed from it.
        extra: In the unmerged form h. In the merged form what x was multiplied by in the update, if it was kept.
        weight: W0.
        bias: b, or None.
        adapters: The adapters.
    """

    x: Tensor
    y: Tensor | None
    extra: Tensor | None
    weight: Tensor
    bias: Tensor | None
    adapters: list[Adapter]

    def bias_grad(self, call: Call, dY: Tensor) -> Tensor:
        """Returns db (O,)."""
        assert self.bias is not None
        return sum_tokens(call.options.op, dY).to(self.bias.dtype)


def save(ctx: Any, call: Call, y: Tensor, wants_dm: bool, x, extra, weight, bias, *tensors) -> Tensor:
    """Saves what `Saved` lists, and returns the output; `wants_dm` says whether dm is wanted and y - b is x W(t)^T.

    y is saved as an alias with a version counter of its own, since autograd refuses a saved tensor that was
    overwritten: the next operation may do that, and dm then takes a product. Whether it did is seen in the version
    counter of the output, which an empty tensor shares without keeping the output's memory.
    """
    y = y.data  # not a view to autograd: the next operation may overwrite it
    is_single = len(call.adapters) == 1 and call.adapters[0].strength == 1
    reads_output = wants_dm and is_single and call.options.save_output and call.kernels.reads_output()
    reads_output = reads_output and not y.is_inference()  # which has no version counter, and no backward pass
    ctx.call, ctx.counter = call, None
    if reads_output and not torch.compiler.is_compiling():
        ctx.counter = y.detach()
        ctx.counter.data = y.new_empty(0)
        ctx.version = ctx.counter._version
    weight = weight if call.options.restore is None else None
    ctx.save_for_backward(x, y.data if reads_output else None, extra, weight, bias, *tensors)
    return y


def saved(ctx: Any) -> Saved:
    """What `save` saved, without an output that was overwritten since.

    Raises:
        ValueError: The weight requires a gradient.
    """
    if ctx.needs_input_grad[3]:
        raise ValueError("the weight of an adapted layer gets no gradient: set its requires_grad to False")
    x, y, extra, weight, bias, *tensors = ctx.saved_tensors
    if ctx.counter is not None and ctx.counter._version != ctx.version:
        y = None
    restore = ctx.call.options.restore
    weight = weight if restore is None else restore()
    return Saved(x, y, extra, weight, bias, ctx.call.adapters_with(tensors))


def adapter_gradients(
    call: Call, kept: Saved, dY: Tensor, needs: Sequence[bool], *, h: Tensor | None = None, needs_u: bool = False
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Computes the gradients of all adapters.

    Args:
        call: The pass.
        kept: What it saved.
        dY: Gradient of the output.
        needs: Whether A, B and m of every adapter need a gradient, as a flat list.
        h: x A^T of all adapters, where it was kept.
        needs_u: Whether u is needed for the gradient of x.

    Returns:
        dA, dB and dm of every adapter as a flat list, None where not needed; and u and A of all adapters, None where
        there are none.
    """
    op, wanted = call.options.op, call.adapters_with(needs)
    A, B = call.branch(kept.adapters)
    trains = any(w.A or w.B for w in wanted)
    u = dA = dB = None
    if B is not None and (trains or needs_u):
        u = op.grad_h(dY, B.to(dY.dtype))
    if u is not None and A is not None and B is not None and trains:
        h = op.reduce(kept.x, A.to(dY.dtype)) if h is None else h.to(dY.dtype)
        dA, dB = op.grad_A(u, kept.x, A), op.grad_B(dY, h, B)
    gradients: list[Tensor | None] = []
    first = 0
    for adapter, rows, wants in zip(kept.adapters, call.rows, wanted, strict=True):
        is_exact = adapter.norm_grad == "exact" and rows.norm is not None and dA is not None
        dm = magnitude_grad(call, kept, dY, adapter, rows) if wants.magnitude or is_exact else None
        own_A = own_B = None
        if dA is not None and dB is not None and adapter.A is not None and adapter.B is not None:
            last = first + len(adapter.A)
            own_A = dA[first:last].to(adapter.A.dtype)
            own_B = dB[:, first:last].to(adapter.B.dtype, memory_format=torch.contiguous_format)
            own_B = scale_rows(own_B, adapter, rows)
            first = last
            if is_exact and dm is not None:
                more_A, more_B = exact_norm_correction(as_matrix(kept.weight), adapter, rows, dm)
                own_A, own_B = own_A.add_(more_A), own_B.add_(more_B)
        gradients += [own_A, own_B, dm if wants.magnitude else None]
    return gradients, u, A


def magnitude_grad(call: Call, kept: Saved, dY: Tensor, adapter: Adapter, rows: RowGains) -> Tensor:
    """Returns dm = t rowsum(dY * x V^T) / n, 0 where n is 0: from y if it was kept, else by a product with V."""
    if kept.y is not None:
        return call.kernels.magnitude_grad(call.options.op, dY, kept.x, kept.y, kept.weight, kept.bias, adapter, rows)
    assert rows.norm is not None
    dots = inner_dots(call.options.op, dY, kept.x, kept.weight, adapter)
    return (adapter.strength * dots / rows.norm).masked_fill_(rows.norm == 0, 0)

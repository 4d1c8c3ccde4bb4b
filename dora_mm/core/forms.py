"""The two forms of the adapted layer, on every device, and the function that chooses between them.

    merged      y = x W(t)^T + b                        W(t) is built, and multiplies once
    unmerged    y = e x W0^T + h B'^T + b               W0 itself, and the low-rank branches of all adapters as one

with h = x [A_1; A_2; ...]^T and B' = [t_1 g_1 s_1 B_1, t_2 g_2 s_2 B_2, ...]. Each is one autograd.Function. The
gradients of A, B and m are the same in both: products with R columns, and sums. Only dX is a product of size T O I.

Dropout drops entries of x in the update only, as the official layer does: y = x W0^T + drop(x) (W(t) - W0)^T + b. In
the merged form that is a second product beside the one with W0. The unmerged form, with h = drop(x) A^T, can do it
without a magnitude.

In half precision W(t) does not fit into one number. The merged form then multiplies x by two weights whose sum it is
(see `split_weight`), in one product that is rounded once.
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
from dora_mm.core.passes import Call, Options, PassCache, Tensors, load, save
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
def split_weight(
    W: Tensor, weight: Tensor, dtype: torch.dtype, has_dropout: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Splits W(t) into two weights in `dtype`, `main` and `rest`.

    A bf16 base lies on the bf16 grid, so an update below half a unit in the last place would vanish from one number.

    Args:
        W: W(t) in at least fp32; it may be overwritten.
        weight: W0.
        dtype: The dtype of the product.
        has_dropout: Whether the update has an input of its own.

    Returns:
        W(t), rounded in half precision, and what is missing from it; or W0 and the update, where that has an input of
        its own. The second is None where it is 0.
    """
    if has_dropout:
        main = weight.detach().to(dtype)
        rest = W - weight.detach()
    elif dtype == W.dtype:
        return W, None
    else:
        if dtype != weight.dtype:  # autocast: the base multiplies by cast(W0), and a fresh adapter changes no bit
            W = W + (weight.detach().to(dtype).to(W.dtype) - weight.detach())
        main = torch.empty_like(weight, dtype=dtype).copy_(W)  # in the layout of W0, for the base's bits
        rest = W.sub_(main)
    # A second product may change the order of summation (in bf16 for 640 x 640 with 2048 tokens it does): a fresh
    # adapter goes without it.
    if can_read(rest) and not any_nonzero(rest):
        return main, None
    return main, rest.to(dtype)


# --- the two forms ---------------------------------------------------------------------------------------------------


class UnmergedForm(torch.autograd.Function):
    """y = e x W0^T + h B'^T + b, with h from `dropped` where that is given (e is then 1)."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arguments):
        given, op = call.tensors(arguments), call.options.op
        A, B = branch(given.adapters)
        h = None
        if A is not None:
            h = op.reduce(given.update_input(), A.to(call.dtype if op.merges else adapter_dtype(call.dtype)))
        W0 = given.weight.detach().to(call.dtype)
        y = call.steps.unmerged(op, given.x, W0, given.bias, base_gain(given.adapters), h, B)
        return save(ctx, call, given, call.needs(ctx), y, h=h)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor):
        (call, saved, needs), (dY,) = load(ctx), grad_outputs
        op = call.options.op
        gradients, u, A = adapter_gradients(call, saved, dY, needs, needs_u=needs.x or needs.dropped)
        dX = d_dropped = None
        if needs.dropped and u is not None and A is not None:
            d_dropped = op.add_grad_reduced(dY.new_zeros(saved.x.shape), u, saved.x, A.to(dY.dtype))
            u = A = None
        if needs.x:
            W0 = saved.weight.detach().to(call.dtype)
            dX = call.steps.unmerged_grad_input(op, dY, saved.x, W0, base_gain(saved.adapters), u, A)
        db = bias_grad(call, saved, dY) if needs.bias else None
        return None, *Tensors(x=dX, dropped=d_dropped, bias=db, adapters=gradients).arguments("unmerged")


class MergedForm(torch.autograd.Function):
    """y = x main^T + x' rest^T + b, the weights as in `split_weight`; x' is `dropped` where that is given, else x."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arguments):
        given, op = call.tensors(arguments), call.options.op
        x, main, rest, bias = given.x, given.main, given.rest, given.bias
        if rest is None:
            y = op(x, main, bias)
        elif main.dtype.itemsize < 4:  # one sum, rounded once
            y = op(op.concatenate(x, given.update_input()), torch.cat([main, rest], 1), bias)
        else:
            y = op(x, main, bias).add_(op(given.update_input(), rest, None))
        needs = call.needs(ctx)
        keeps = call.options.keep_weight and (needs.x or needs.dropped)
        return save(ctx, call, given, needs, y, main=(main if given.dropped is None else rest) if keeps else None)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor):
        (call, saved, needs), (dY,) = load(ctx), grad_outputs
        op, has_dropout = call.options.op, call.options.dropout > 0
        gradients, _, _ = adapter_gradients(call, saved, dY, needs)
        dX = d_update = None
        if needs.dropped or (needs.x and not has_dropout):
            W = saved.main if saved.main is not None else built_again(call, saved)
            d_update = op.grad_input(dY, saved.x, W)  # without `rest`: half precision rounds dX by as much
        if needs.x and has_dropout:
            dX = op.grad_input(dY, saved.x, saved.weight.detach().to(dY.dtype))
        dX, d_dropped = (dX, d_update) if has_dropout else (d_update, None)
        db = bias_grad(call, saved, dY) if needs.bias else None
        return None, *Tensors(x=dX, dropped=d_dropped, bias=db, adapters=gradients).arguments("merged")


def built_again(call: Call, saved: Tensors) -> Tensor:
    """Returns what the input of the update was multiplied by: W(t), or with dropout the update."""
    has_dropout = call.options.dropout > 0
    W, _ = merge_adapters(saved.weight, saved.adapters, [a.rows for a in saved.adapters])
    main, rest = split_weight(W, saved.weight, call.dtype, has_dropout)
    if not has_dropout:
        return main
    return torch.zeros_like(main) if rest is None else rest


# --- what they need of all adapters ----------------------------------------------------------------------------------


def base_gain(adapters: Sequence[Adapter]) -> Tensor | None:
    """Returns e = 1 + sum_k t_k (g_k - 1), (O,); None for 1."""
    total = None
    for adapter in adapters:
        if adapter.rows is not None:
            gain = adapter.rows.gain
            part = gain if adapter.strength == 1 else 1 + adapter.strength * (gain - 1)
            total = part if total is None else total + (part - 1)
    return total


def branch(adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None]:
    """Returns A and B' of all adapters, concatenated along the rank; None where none has them."""
    pairs = [(a.A, scaled(a.B, a)) for a in adapters if a.A is not None and a.B is not None]
    if len(pairs) <= 1:
        return pairs[0] if pairs else (None, None)
    A, B = zip(*pairs, strict=True)
    return torch.cat(A), torch.cat(B, 1)


def scaled(t: Tensor, adapter: Adapter) -> Tensor:
    """Multiplies B or dB (O, R) by strength, gain and scaling of the adapter."""
    factor = adapter.scaling * adapter.strength
    if adapter.rows is None:
        return t if factor == 1 else t * factor
    gain = adapter.rows.gain
    return t * (gain if factor == 1 else gain * factor)[:, None]


# --- their gradients -------------------------------------------------------------------------------------------------


def adapter_gradients(
    call: Call, saved: Tensors, dY: Tensor, needs: Tensors, *, needs_u: bool = False
) -> tuple[list[Adapter], Tensor | None, Tensor | None]:
    """Computes the gradients of all adapters.

    Args:
        call: The pass.
        saved: What it saved.
        dY: Gradient of the output.
        needs: Whether each tensor needs a gradient.
        needs_u: Whether u is needed for the gradient of x.

    Returns:
        Every adapter with dA, dB and dm, None where not needed; and u and A of all adapters, None where there are none.
    """
    op = call.options.op
    A, B = branch(saved.adapters)
    trains = any(a.A or a.B for a in needs.adapters)
    u = dA = dB = None
    if B is not None and (trains or needs_u):
        u = op.grad_h(dY, B.to(dY.dtype))
    if u is not None and A is not None and B is not None and trains:
        h = op.reduce(saved.x, A.to(dY.dtype)) if saved.h is None else saved.h.to(dY.dtype)
        dA, dB = op.grad_A(u, saved.x, A), op.grad_B(dY, h, B)
    gradients = []
    first = 0
    for adapter, wants in zip(saved.adapters, needs.adapters, strict=True):
        is_exact = adapter.norm_grad == "exact" and adapter.rows is not None and dA is not None
        dm = magnitude_grad(call, saved, dY, adapter) if wants.magnitude or is_exact else None
        own_A = own_B = None
        if dA is not None and dB is not None and adapter.A is not None and adapter.B is not None:
            last = first + len(adapter.A)
            own_A = dA[first:last].to(adapter.A.dtype)
            own_B = dB[:, first:last].to(adapter.B.dtype, memory_format=torch.contiguous_format)
            own_B = scaled(own_B, adapter)
            first = last
            if is_exact and dm is not None:
                more_A, more_B = exact_norm_correction(as_matrix(saved.weight), adapter, dm)
                own_A, own_B = own_A.add_(more_A), own_B.add_(more_B)
        gradients.append(adapter.with_tensors(own_A, own_B, dm if wants.magnitude else None))
    return gradients, u, A


def magnitude_grad(call: Call, saved: Tensors, dY: Tensor, adapter: Adapter) -> Tensor:
    """Returns dm = t sum over tokens of dY * (x V^T), / n; 0 where n is 0. It takes a product where y was not kept."""
    op = call.options.op
    if saved.y is not None:
        return call.steps.magnitude_grad(op, dY, saved.x, saved.y, saved.weight, saved.bias, adapter)
    assert adapter.rows is not None
    norm = adapter.rows.norm
    dots = inner_dots(op, dY, saved.x, saved.weight, adapter)
    return (adapter.strength * dots / norm).masked_fill_(norm == 0, 0)


def bias_grad(call: Call, saved: Tensors, dY: Tensor) -> Tensor:
    """Returns db (O,)."""
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
    cache = options.cache or PassCache()
    with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
        merges = form_of(x, weight, adapters, options, dtype, steps) == "merged"
        dropped = F.dropout(x, options.dropout) if options.dropout else None
        merged = cache.merged if merges and dropped is None else None
        if merges and merged is None:
            W, cache.rows = merge_adapters(weight, adapters, cache.rows)
            merged = split_weight(W, weight, dtype, dropped is not None)
            if options.keep_weight and dropped is None:
                cache.merged = merged
        if cache.rows is None:
            n0 = row_norm(weight.detach()) if cache.n0 is None and has_magnitude(adapters) else cache.n0
            cache.rows = tuple(steps.row_gains(weight, adapter, n0) for adapter in adapters)
        call = Call(options, steps, dtype, tuple(a.of_pass(own) for a, own in zip(adapters, cache.rows, strict=True)))
        main, rest = merged or (None, None)
        tensors = Tensors(x, dropped, weight, bias, adapters, main, rest)
        if merges:
            return MergedForm.apply(call, *tensors.arguments("merged"))
        return UnmergedForm.apply(call, *tensors.arguments("unmerged"))


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
        weight.numel() // weight.shape[0],
        sum(0 if a.A is None else a.A.shape[0] for a in adapters),
        half=dtype.itemsize < 4,
        has_magnitude=has_magnitude(adapters),
        dropout=options.dropout > 0,
        num_passes=options.num_passes if options.keep_weight else 1.0,
        rounds_once=steps.rounds_once,
    )


def has_magnitude(adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter has a magnitude."""
    return any(a.magnitude is not None for a in adapters)

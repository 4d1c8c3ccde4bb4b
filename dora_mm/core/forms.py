"""The two forms of the adapted layer, on every device, and the function that chooses between them.

    merged      y = x W(t)^T + b                        W(t) is built, and multiplies once
    unmerged    y = e x W0^T + h B'^T + b               W0 itself, and the low-rank branches of all adapters as one

with h = x [A_1; A_2; ...]^T and B' = [t_1 g_1 s_1 B_1, t_2 g_2 s_2 B_2, ...]. Each is one autograd.Function. The
gradients of A, B and m are the same in both: products with R columns, and sums. Only dX is a product of size T O I.

Dropout drops entries of x in the update only, as the official layer does: y = x W0^T + drop(x) (W(t) - W0)^T + b. In
the merged form that takes a second product besides W0's. The unmerged form, with h = drop(x) A^T, can do it
without a magnitude.

In half precision the sum must be rounded once, and y not scaled after that. Without a magnitude the unmerged form takes
[x, h] [W0, B']^T. W(t) does not fit into one number: the merged form multiplies x by two weights whose sum it is (see
`split_weight`), as [x, x] [main, rest]^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.core.functional import (
    ROWS_AT_ONCE,
    Adapter,
    RowGains,
    autocasts,
    can_read,
    cast,
    first_order,
    merge_adapters,
    product_dtype,
    without_autocast,
)
from dora_mm.core.ops import GroupedOp, Op
from dora_mm.core.passes import Options, PassCache, SavedPass, load, save, with_tensors
from dora_mm.core.steps import TORCH_STEPS, Steps, adapter_gradients, bias_grad, has_magnitude

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
    joins: bool = True,
    has_magnitude: bool = True,
    dropout: bool = False,
    num_passes: float = 1.0,
    is_inference: bool = False,
) -> Literal["merged", "unmerged"]:
    """Chooses the form of a layer whose W(t) may be built. It depends on nothing that another pass leaves behind.

    (A checkpointed pass runs twice, and has to save the same tensors both times.)

    Args:
        num_tokens: T.
        num_out: O.
        num_in: I, for a convolution times the kernel's size.
        rank: The sum of the adapters' ranks.
        half: Whether the product runs in half precision.
        joins: Whether the branch can be part of the product, see `Op.can_join`.
        has_magnitude: Whether any adapter has a magnitude.
        dropout: Whether entries of x are dropped in the update.
        num_passes: How many forward passes one W(t) serves.
        is_inference: See `Options`: a sum may be rounded twice, and norms are known from an earlier pass.
    """
    if dropout and has_magnitude:
        return "merged"  # either form has two large products, and this one rounds their sum once
    if half and not is_inference:
        return "unmerged" if joins and not has_magnitude else "merged"
    build = num_out * num_in * (rank + BUILD_COST)
    unmerged = num_tokens * (rank * (num_out + num_in) + UNMERGED_COST * num_out)
    norm = (
        num_out * num_in * rank if has_magnitude and not is_inference else 0
    )  # W0 A^T; where W(t) is built, its norm is one pass
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
        its own. The second is None where nothing is missing.
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
    return main, rest.to(dtype)


def merged_parts(
    weight: Tensor,
    adapters: Sequence[Adapter],
    rows: Sequence[RowGains | None] | None,
    dtype: torch.dtype,
    has_dropout: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], Sequence[RowGains | None]]:
    """Builds W(t) for a product in `dtype`.

    In half precision it takes some ten passes over numbers in fp32. On a processor they go over blocks of rows that
    stay in its cache, which is four times faster (1280 x 1280 in bf16 on one core of an AMD EPYC: 1.8 ms, not 6.8).

    Args:
        weight: W0 (O, I), or a kernel (O, I / groups, *K).
        adapters: The adapters, each with its strength.
        rows: n and g of every adapter, where they are known already.
        dtype: The dtype of the product.
        has_dropout: See `split_weight`.

    Returns:
        W(t), as `split_weight` returns it, and n and g of every adapter.
    """
    num_blocks = weight.shape[0] // ROWS_AT_ONCE
    if dtype.itemsize >= 4 or num_blocks < 2 or weight.device.type != "cpu" or not can_read(weight):
        W, found = merge_adapters(weight, adapters, rows)
        return split_weight(W, weight, dtype, has_dropout), found
    main, rest = torch.empty_like(weight, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    found_of, first = [], 0
    for W0, to_main, to_rest in zip(*(t.tensor_split(num_blocks) for t in (weight, main, rest)), strict=True):
        block = slice(first, first := first + len(W0))
        known = None if rows is None else [each and each.of_rows(block) for each in rows]
        W, found = merge_adapters(W0, [adapter.of_rows(block) for adapter in adapters], known)
        parts = split_weight(W, W0, dtype, has_dropout)
        to_main.copy_(parts[0])
        to_rest.copy_(parts[1])
        found_of.append(found)
    return (main, rest), rows or [joined_rows(each) for each in zip(*found_of, strict=True)]


def joined_rows(blocks: Sequence[RowGains | None]) -> RowGains | None:
    """Joins n and g of one adapter from blocks of rows; None where it has no magnitude."""
    found = [block for block in blocks if block is not None]
    if not found:
        return None
    norm, gain = torch.cat([block.norm for block in found]), torch.cat([block.gain for block in found])
    return RowGains(norm, gain, all(block.regular for block in found))


# --- the two forms ---------------------------------------------------------------------------------------------------


class UnmergedForm(torch.autograd.Function):
    """y = e x W0^T + h B'^T + b, with h from `dropped` where that is given (e is then 1)."""

    @staticmethod
    def forward(ctx: Any, options: Options, dtype, adapters, x, dropped, weight, bias, *tensors):
        source, (*own, operand, ctx.steps) = x if dropped is None else dropped, tensors
        y, h = ctx.steps.product(options, dtype, x, source, weight, bias, with_tensors(adapters, own), operand)
        keeps = dropped is None and ctx.steps.keeps_output(x)
        unsafe = ctx.steps.find_unsafe(options, y, bias, adapters) if keeps else None
        call = ctx, options, dtype, adapters, y, source, weight, bias, h, own
        return save(*call, keeps_output=keeps, unsafe=unsafe)

    @staticmethod
    @first_order
    def backward(ctx: Any, dY: Tensor):
        dX, d_dropped, db, gradients = ctx.steps.gradients(load(ctx), dY)
        return None, None, None, dX, d_dropped, None, db, *gradients, None, None


class MergedForm(torch.autograd.Function):
    """y = x main^T + x' rest^T + b, the weights as in `split_weight`; x' is `dropped` where that is given, else x."""

    @staticmethod
    def forward(ctx: Any, options: Options, dtype, adapters, x, dropped, weight, bias, *tensors):
        op, source, (*own, main, rest) = options.op, x if dropped is None else dropped, tensors
        y = merged_product(op, x, source, main, rest, bias)
        _, _, _, needs_x, needs_dropped, *_ = ctx.needs_input_grad
        keeps_weight = options.keep_weight and (needs_x or needs_dropped)
        kept = (main if dropped is None else rest) if keeps_weight else None
        keeps = dropped is None and TORCH_STEPS.keeps_output(x)
        unsafe = TORCH_STEPS.find_unsafe(options, y, bias, adapters) if keeps else None
        call = ctx, options, dtype, adapters, y, source, weight, bias, kept, own
        return save(*call, keeps_output=keeps, unsafe=unsafe)

    @staticmethod
    @first_order
    def backward(ctx: Any, dY: Tensor):
        saved = load(ctx)
        op, has_dropout = saved.options.op, saved.options.dropout > 0
        gradients, _, _ = adapter_gradients(saved, dY)
        dX = d_update = None
        if saved.needs_dropped or (saved.needs_x and not has_dropout):
            W = saved.kept if saved.kept is not None else built_again(saved)
            d_update = op.grad_input(dY, saved.x, W)  # without `rest`: half precision rounds dX by as much
        if saved.needs_x and has_dropout:
            dX = op.grad_input(dY, saved.x, cast(saved.weight, dY.dtype))
        dX, d_dropped = (dX, d_update) if has_dropout else (d_update, None)
        db = bias_grad(saved, dY) if saved.needs_bias else None
        return None, None, None, dX, d_dropped, None, db, *gradients, None, None


def merged_product(op: Op, x: Tensor, source: Tensor, main: Tensor, rest: Tensor | None, bias: Tensor | None) -> Tensor:
    """Computes x main^T + `source` rest^T + b; in half precision as one sum, which is rounded once."""
    if rest is None:
        return op(x, main, bias)
    if main.dtype.itemsize < 4:
        return op(op.concatenate(x, source), torch.cat([main, rest], 1), bias)
    return op(x, main, bias).add_(op(source, rest, None))


def built_again(saved: SavedPass) -> Tensor:
    """Returns what the input of the update was multiplied by: W(t), or with dropout the update."""
    has_dropout = saved.options.dropout > 0
    rows = [adapter.rows for adapter in saved.adapters]
    (main, rest), _ = merged_parts(saved.weight, saved.adapters, rows, saved.dtype, has_dropout)
    return main if rest is None or not has_dropout else rest


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
    if options.op.stacked and not steps.takes_stacks:
        return product_of_stack(x, weight, adapters, options, steps)
    if options.is_wide and not steps.only_unmerged and weight.dtype.itemsize < 4 and has_magnitude(adapters):
        return widened_product(x, weight, adapters, options, steps)
    autocast = autocasts(weight.device)
    dtype = weight.dtype
    if options.op.merges and (autocast or options.dtype is not None):  # embeddings are not autocast
        dtype = product_dtype(weight) if autocast or options.dtype is None else options.dtype
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    cache = options.cache or PassCache()
    rows, merged, operand = cache.rows, None, None
    if options.is_inference:
        with without_autocast(weight.device):
            return inferred_product(x, weight, bias, adapters, options, dtype, cache, steps)
    with without_autocast(weight.device):
        dropped = F.dropout(x, options.dropout) if options.dropout else None
        if form_of(x, weight, adapters, options, dtype, steps) == "merged":
            merged = cache.merged if dropped is None else None
            if merged is None:
                (main, rest), rows = merged_parts(weight, adapters, rows, dtype, dropped is not None)
                merged = main, rest if rest is not None and cache.finds_update(rest) else None
                if options.keep_weight and dropped is None and cache.keeps:
                    cache.merged = merged
        else:
            rows, operand = steps.prepare(weight, adapters, cache, dtype)
        if cache.keeps:
            cache.rows = rows
        own, settings = [], []
        for adapter, found in zip(adapters, rows or (), strict=True):
            own += adapter.A, adapter.B, adapter.magnitude
            settings.append(adapter.of_pass(found))
        call = options, dtype, settings, x, dropped, weight, bias
        if merged is not None:
            return MergedForm.apply(*call, *own, *merged)
        return UnmergedForm.apply(*call, *own, operand, steps)


def inferred_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    options: Options,
    dtype: torch.dtype,
    cache: PassCache,
    steps: Steps,
) -> Tensor:
    """Computes `adapted_product` where there is no backward pass; `cache` serves until a parameter changes."""
    if form_of(x, weight, adapters, options, dtype, steps) == "merged":
        (main, rest), cache.rows = merged_parts(weight, adapters, cache.rows, dtype)
        return merged_product(
            options.op, x, x, main, rest if rest is not None and cache.finds_update(rest) else None, bias
        )
    if cache.inference is None:
        cache.rows, operand = steps.prepare(weight, adapters, cache, dtype)
        own = [adapter._replace(rows=found) for adapter, found in zip(adapters, cache.rows, strict=True)]
        cache.inference = steps.keep(options, dtype, bias, own, operand)
    return steps.infer(options, dtype, x, weight, bias, cache.inference)


def widened_product(x: Tensor, weight: Tensor, adapters: Sequence[Adapter], options: Options, steps: Steps) -> Tensor:
    """Computes `adapted_product` in float32, and rounds it once: see `Options.is_wide`."""
    own = options._replace(is_wide=False, restore=weight.float)
    with without_autocast(weight.device):
        return adapted_product(x.float(), weight.float(), None, adapters, own, steps).to(weight.dtype)


def product_of_stack(x: Tensor, weight: Tensor, adapters: Sequence[Adapter], options: Options, steps: Steps) -> Tensor:
    """Computes `adapted_product` of each matrix of a stack with its rows, see `GroupedOp`.

    Of size (E, O, I) nothing is built, or a gradient. Matrices without rows are not read.
    """
    op, ys = options.op, []
    assert isinstance(op, GroupedOp)
    cache, of_each = options.cache or PassCache(), [adapter.of_matrices(len(weight)) for adapter in adapters]
    for index, rows in enumerate(x.split(op.counts(len(x)))):
        if len(rows):
            own = options._replace(op=op.each, cache=cache.of_matrix(index))
            ys.append(adapted_product(rows, weight[index], None, [each[index] for each in of_each], own, steps))
    return torch.cat(ys) if ys else F.linear(x, weight[0])


TORCH: Forward = adapted_product


def form_of(
    x: Tensor, weight: Tensor, adapters: Sequence[Adapter], options: Options, dtype: torch.dtype, steps: Steps
) -> Literal["merged", "unmerged"]:
    """`choose_form` for the tensors of a pass."""
    if steps.only_unmerged or not options.op.merges:
        return "unmerged"  # whatever the sizes are
    rank, half = sum(0 if a.A is None else a.A.shape[0] for a in adapters), dtype.itemsize < 4
    return choose_form(
        options.op.num_tokens(x, weight),
        weight.shape[0],
        weight.numel() // weight.shape[0],
        rank,
        half=half,
        joins=half and options.op.can_join(weight, rank),
        has_magnitude=has_magnitude(adapters),
        dropout=options.dropout > 0,
        num_passes=options.num_passes if options.keep_weight else 1.0,
        is_inference=options.is_inference,
    )

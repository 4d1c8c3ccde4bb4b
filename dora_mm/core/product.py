"""The adapted layer as a function of tensors: it chooses a form, and computes what depends on the parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.core.forms import Merged, Unmerged, choose_form, split_weight
from dora_mm.core.functional import Adapter, autocasts, merge_adapters, product_dtype, row_norm
from dora_mm.core.passes import Call, Kept, Options
from dora_mm.core.steps import TORCH_STEPS, Steps

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

"""A pass through an adapted layer: its options, what is kept from one pass to the next, what is saved for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, RowGains
from dora_mm.core.ops import LINEAR, Op
from dora_mm.core.steps import Steps


class MergedWeight(NamedTuple):
    """Two weights whose sum is W(t), in the dtype of the product.

    Attributes:
        main: W(t), rounded in half precision; or W0, where dropout gives the update an input of its own.
        rest: What is missing from W(t), shaped like `main`; None where it is 0.
    """

    main: Tensor
    rest: Tensor | None


@dataclass
class Kept:
    """What is kept of a layer from one pass to the next, for products in one dtype.

    `fixed_parameters` opens one per layer; outside of it, one serves a single pass. `adapted_product` fills it.

    Attributes:
        n0: The row norms of the weight (O,), where it is known not to have changed.
        num_passes: How many forward passes this serves; may be infinite.
        gains: n and g of every adapter.
        merged: W(t).
    """

    n0: Tensor | None = None
    num_passes: float = 1.0
    gains: tuple[RowGains, ...] | None = None
    merged: MergedWeight | None = None


class Options(NamedTuple):
    """How a layer computes its product.

    Attributes:
        op: The operation of the layer.
        dropout: Probability of dropping entries of x in the update.
        keep_weight: Whether W(t), where it is built, is kept for the backward pass and in `kept`, or built again.
        save_output: Whether y may be kept for the backward pass; dm then costs no product of size T O I. It is not
            used where the next operation overwrote it (which writing to `y.data` hides).
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


class Call(NamedTuple):
    """A pass, without its tensors.

    Attributes:
        options: See `Options`.
        steps: The implementation of the steps.
        dtype: The dtype of the product.
        adapters: The adapters without A, B and m.
        gains: n and g of every adapter.
    """

    options: Options
    steps: Steps
    dtype: torch.dtype
    adapters: tuple[Adapter, ...]
    gains: tuple[RowGains, ...]

    def adapters_with(self, flat: Sequence[Any]) -> list[Adapter]:
        """The adapters with A, B and m from a flat list: of tensors, or of whether they need a gradient."""
        return [a.holding(*flat[3 * k : 3 * k + 3]) for k, a in enumerate(self.adapters)]

    def base_gain(self) -> Tensor | None:
        """Returns e = 1 + sum_k t_k (g_k - 1), (O,); None for 1."""
        total = None
        for adapter, gains in zip(self.adapters, self.gains, strict=True):
            if gains.gain is not None:
                part = gains.gain if adapter.strength == 1 else 1 + adapter.strength * (gains.gain - 1)
                total = part if total is None else total + (part - 1)
        return total

    def branch(self, adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None]:
        """Returns A and B' of all adapters, concatenated along the rank; None where none has them."""
        pairs = [
            (a.A, scaled(a.B, a, gains))
            for a, gains in zip(adapters, self.gains, strict=True)
            if a.A is not None and a.B is not None
        ]
        if len(pairs) <= 1:
            return pairs[0] if pairs else (None, None)
        A, B = zip(*pairs, strict=True)
        return torch.cat(A), torch.cat(B, 1)


def scaled(t: Tensor, adapter: Adapter, gains: RowGains) -> Tensor:
    """Multiplies B or dB (O, R) by strength, gain and scaling of the adapter."""
    factor = adapter.scaling * adapter.strength
    if gains.gain is None:
        return t if factor == 1 else t * factor
    return t * (gains.gain if factor == 1 else gains.gain * factor)[:, None]


class Saved(NamedTuple):
    """What a pass saved for its backward pass.

    Attributes:
        x: The input of the update: x, or what dropout leaves of it.
        y: The output; None where dm is not computed from it.
        extra: In the unmerged form h. In the merged form the weight that the input of the update was multiplied by, if
            it was kept.
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


def save(ctx: Any, call: Call, y: Tensor, wants_dm: bool, x, extra, weight, bias, *tensors) -> Tensor:
    """Saves what `Saved` lists, and returns the output; `wants_dm` says whether dm is wanted and y - b is x W(t)^T.

    autograd refuses a saved tensor that was overwritten, and the next operation may overwrite the output. So what is
    saved is an alias of y with a version counter of its own. `ctx.counter`, an empty tensor, shares the counter of y
    without keeping its memory: where it has moved, `load` leaves y out, and dm takes a product.
    """
    y = y.data  # not a view to autograd
    is_single = len(call.adapters) == 1 and call.adapters[0].strength == 1
    reads_output = wants_dm and is_single and call.options.save_output and call.steps.reads_output()
    ctx.call, ctx.counter = call, None
    if reads_output and not torch.compiler.is_compiling() and not y.is_inference():
        ctx.counter = y.detach()
        ctx.counter.data = y.new_empty(0)
        ctx.version = ctx.counter._version
    weight = weight if call.options.restore is None else None
    alias = y.clone() if torch.compiler.is_compiling() else y.data  # a compiled graph has no version counters
    ctx.save_for_backward(x, alias if reads_output else None, extra, weight, bias, *tensors)
    return y


def load(ctx: Any) -> Saved:
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

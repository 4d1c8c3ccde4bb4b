"""A pass through an adapted layer: its options, its tensors, and what is kept from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, RowGains
from dora_mm.core.ops import LINEAR, Op
from dora_mm.core.steps import Steps


@dataclass
class PassCache:
    """What one pass computes and others may use, for products in one dtype.

    `fixed_parameters` opens one per layer; outside of it, one serves a single pass. `adapted_product` fills it.

    Attributes:
        n0: The row norms of the weight (O,), where it is known not to have changed.
        rows: n and g of every adapter.
        merged: W(t), as `forms.split_weight` returns it.
    """

    n0: Tensor | None = None
    rows: tuple[RowGains | None, ...] | None = None
    merged: tuple[Tensor, Tensor | None] | None = None


class Options(NamedTuple):
    """How a layer computes its product.

    Attributes:
        op: The operation of the layer.
        dropout: Probability of dropping entries of x in the update.
        keep_weight: Whether W(t), where it is built, is kept for the backward pass and in `cache`, or built again.
        save_output: Whether y may be kept for the backward pass; dm then costs no product of size T O I. It is not
            used where the next operation overwrote it (which writing to `y.data` hides).
        cache: What is kept from one pass to the next; without it, the parameters are read in every pass.
        num_passes: How many forward passes the cache serves; may be infinite.
        dtype: The dtype of the product outside autocast, where it is not that of the weight.
        restore: Returns the weight again in the backward pass, where it was made for this pass and must not be kept.
    """

    op: Op = LINEAR
    dropout: float = 0.0
    keep_weight: bool = True
    save_output: bool = True
    cache: PassCache | None = None
    num_passes: float = 1.0
    dtype: torch.dtype | None = None
    restore: Callable[[], Tensor] | None = None


class Tensors(NamedTuple):
    """The tensors of a pass, or a flag or a gradient for each of them.

    autograd takes, saves and returns flat lists. Their order is that of the fields here, with A, B and m of each
    adapter. Only this class and `Call.tensors` know it.

    Attributes:
        x: The input of the layer; among the saved ones that of the update.
        dropped: The input of the update, which is what dropout leaves of x; None without dropout.
        weight: W0.
        bias: b, or None.
        adapters: The adapters, with A, B and m.
        main: The first of the two weights of `forms.split_weight`, in the merged form; among the saved ones the weight
            that the input of the update was multiplied by, if it was kept.
        rest: The second one.
        h: x A^T of all adapters, in the unmerged form; only among the saved ones.
        y: The output, where dm is computed from it; only among the saved ones.
    """

    x: Any = None
    dropped: Any = None
    weight: Any = None
    bias: Any = None
    adapters: Sequence[Adapter] = ()
    main: Any = None
    rest: Any = None
    h: Any = None
    y: Any = None

    def update_input(self) -> Tensor:
        """The input of the update."""
        return self.x if self.dropped is None else self.dropped

    def flat(self) -> list[Any]:
        """All of them in one list."""
        own = [t for a in self.adapters for t in (a.A, a.B, a.magnitude)]
        return [self.x, self.dropped, self.weight, self.bias, *own, self.main, self.rest, self.h, self.y]

    def arguments(self, form: str) -> list[Any]:
        """Those that autograd is given, or their gradients: each None more costs 4 us per pass on an Intel Xeon."""
        return self.flat()[: -2 if form == "merged" else -4]


class Call(NamedTuple):
    """A pass, without its tensors.

    Attributes:
        options: See `Options`.
        steps: The implementation of the steps.
        dtype: The dtype of the product.
        adapters: The adapters with n and g, without A, B and m.
    """

    options: Options
    steps: Steps
    dtype: torch.dtype
    adapters: tuple[Adapter, ...]

    def tensors(self, flat: Sequence[Any]) -> Tensors:
        """The record of a flat list, at whose end some may be missing."""
        adapters = [a.with_tensors(*flat[4 + 3 * k : 7 + 3 * k]) for k, a in enumerate(self.adapters)]
        return Tensors(*flat[:4], adapters, *flat[4 + 3 * len(adapters) :])  # pyright: ignore[reportCallIssue]

    def needs(self, ctx: Any) -> Tensors:
        """Whether each tensor needs a gradient."""
        return self.tensors(ctx.needs_input_grad[1:])  # the first argument is the call itself


def save(
    ctx: Any,
    call: Call,
    given: Tensors,
    needs: Tensors,
    y: Tensor,
    *,
    main: Tensor | None = None,
    h: Tensor | None = None,
) -> Tensor:
    """Saves a pass for its backward pass, and returns the output.

    autograd refuses a saved tensor that was overwritten, and the next operation may overwrite the output. So what is
    saved is an alias of y with a version counter of its own. `ctx.counter`, an empty tensor, shares the counter of y
    without keeping its memory: where it has moved, `load` leaves y out, and dm takes a product.

    Args:
        ctx: The context of the autograd.Function.
        call: The pass.
        given: The tensors that it was given.
        needs: Whether each needs a gradient.
        y: Its output.
        main: See `Tensors`.
        h: See `Tensors`.
    """
    y = y.data  # not a view to autograd
    is_product = given.dropped is None and len(call.adapters) == 1 and call.adapters[0].strength == 1  # y - b = x W'^T
    wants_dm = is_product and needs.adapters[0].magnitude
    reads_output = wants_dm and call.options.save_output and call.steps.reads_output()
    ctx.call, ctx.counter = call, None
    if reads_output and not torch.compiler.is_compiling() and not y.is_inference():
        ctx.counter = y.detach()
        ctx.counter.data = y.new_empty(0)
        ctx.version = ctx.counter._version
    alias = y.clone() if torch.compiler.is_compiling() else y.data  # a compiled graph has no version counters
    saved = Tensors(
        x=given.update_input(),
        weight=given.weight if call.options.restore is None else None,
        bias=given.bias,
        main=main,
        h=h,
        y=alias if reads_output else None,
        adapters=given.adapters,
    )
    ctx.save_for_backward(*saved.flat())
    return y


def load(ctx: Any) -> tuple[Call, Tensors, Tensors]:
    """What `save` saved, without an output that was overwritten since.

    Returns:
        The pass, its tensors, and whether each needs a gradient.

    Raises:
        ValueError: The weight requires a gradient.
    """
    call = ctx.call
    needs, saved, restore = call.needs(ctx), call.tensors(ctx.saved_tensors), call.options.restore
    if needs.weight:
        raise ValueError("the weight of an adapted layer gets no gradient: set its requires_grad to False")
    if ctx.counter is not None and ctx.counter._version != ctx.version:
        saved = saved._replace(y=None)
    if restore is not None:
        saved = saved._replace(weight=restore())
    return call, saved, needs

"""A pass through an adapted layer: its options, its tensors, and what is kept from one pass to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, RowGains, any_nonzero, can_read
from dora_mm.core.ops import LINEAR, Op
from dora_mm.core.reads import RowMask

# The arguments of both forms begin with options, dtype, adapters, x, dropped, weight, bias, then A, B and m of each.
FIRST_MAGNITUDE = 9  # the place of the first adapter's m among them


@dataclass
class PassCache:
    """Values that one pass computes and others may reuse, for products in one dtype.

    `fixed_parameters` opens one per layer; outside of it, one serves a single pass, or passes of inference as long as
    parameters stay. `adapted_product` fills it.

    Attributes:
        n0: The row norms of the weight (O,), where a pass has needed them.
        rows: n and g of every adapter.
        merged: W(t), as `forms.split_weight` returns it.
        keeps: Whether a pass may store values that depend on the adapters: not where only the base weight is fixed.
        keeps_base: Whether n0 serves other passes, too.
        checks_update: Whether an earlier pass may have found no update. Only then waiting for a GPU to know pays.
        has_update: Whether the adapters differ from fresh ones; None where no pass has checked.
        inference: The result of `Steps.keep`, for inference passes in the unmerged form.
        matrices: The caches of single matrices of a stack, by index.
    """

    n0: Tensor | None = None
    rows: Sequence[RowGains | None] | None = None
    merged: tuple[Tensor, Tensor | None] | None = None
    keeps: bool = True
    keeps_base: bool = False
    checks_update: bool = True
    has_update: bool | None = None
    inference: Any = None
    matrices: dict[int, PassCache] = field(default_factory=dict)

    def of_matrix(self, index: int) -> PassCache:
        """The cache of one matrix of a stack."""
        found = self.matrices.get(index)
        if found is None:
            n0 = None if self.n0 is None else self.n0[index]
            found = self.matrices[index] = PassCache(n0, keeps_base=self.keeps_base)
        found.keeps = self.keeps
        return found

    def forget_adapters(self) -> None:
        """Discards what depends on the adapters."""
        self.rows = self.merged = self.has_update = None
        for cache in self.matrices.values():
            cache.forget_adapters()

    def finds_update(self, t: Tensor) -> bool:
        """Whether an update differs from 0, or has to be taken as one that does: a recorded graph reads no values.

        A fresh adapter's is left out, since it may change the order of summation even so (in bf16 for 640 x 640 with
        2048 tokens it does). A trained one does not wait for a GPU to say that it is one.
        """
        if not can_read(t) or (t.device.type != "cpu" and not self.checks_update):
            return True
        found = any_nonzero(t) if self.has_update is None else self.has_update
        if self.keeps:
            self.has_update = found
        self.checks_update = not found
        return found


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
        is_inference: Whether there is no backward pass, and `cache` serves as many passes as are made until a parameter
            changes. W(t) is not kept for them.
        is_wide: Whether training over a weight in half precision computes in float32, with a copy of the weight that is
            made again for the backward pass. For few tokens that takes a quarter of the time of W(t), which in half
            precision is two weights.
    """

    op: Op = LINEAR
    dropout: float = 0.0
    keep_weight: bool = True
    save_output: bool = True
    cache: PassCache | None = None
    num_passes: float = 1.0
    dtype: torch.dtype | None = None
    restore: Callable[[], Tensor] | None = None
    is_inference: bool = False
    is_wide: bool = False


class SavedPass(NamedTuple):
    """The inputs of a backward pass.

    Attributes:
        options: See `Options`.
        dtype: The dtype of the product.
        x: The input of the update: the layer's input after dropout.
        weight: W0.
        bias: b, or None.
        kept: In the unmerged form h = x A^T of all adapters; in the merged form the weight that x was multiplied by, if
            it was kept.
        y: The output, where dm is computed from it.
        unsafe: The rows for which that is not safe, where the forward pass has looked for them.
        adapters: The adapters, with A, B and m, n and g.
        needs_x: Whether the gradient of the input is needed.
        needs_dropped: Whether that of the input after dropout is.
        needs_bias: Whether that of the bias is.
        needs: Whether those of A, B and m of each adapter are, as a flat list; what follows them is without meaning.
    """

    options: Options
    dtype: torch.dtype
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    kept: Tensor | None
    y: Tensor | None
    unsafe: RowMask | None
    adapters: list[Adapter]
    needs_x: bool
    needs_dropped: bool
    needs_bias: bool
    needs: Sequence[bool]


def with_tensors(adapters: Sequence[Adapter], own: Sequence[Any]) -> list[Adapter]:
    """Adapters with A, B and m, which autograd takes and returns as a flat list."""
    found, first = [], 0
    for adapter in adapters:
        found.append(adapter.with_tensors(*own[first : first + 3]))
        first += 3
    return found


def save(
    ctx: Any,
    options: Options,
    dtype: torch.dtype,
    adapters: Sequence[Adapter],
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    own: Sequence[Tensor | None],
    *,
    keeps_output: bool,
    unsafe: RowMask | None,
) -> Tensor:
    """Saves a pass for its backward pass, and returns the output.

    autograd refuses a saved tensor that was overwritten, and the next operation may overwrite the output. So what is
    saved is an alias of y with a version counter of its own. `ctx.counter`, an empty tensor, shares the counter of y
    without keeping its memory: where it has moved, `load` leaves y out, and dm takes a product.

    Args:
        ctx: The context of the autograd.Function.
        options: See `SavedPass`.
        dtype: See `SavedPass`.
        adapters: The adapters with n and g, without A, B and m.
        y: The output of the pass.
        x: See `SavedPass`.
        weight: See `SavedPass`.
        bias: See `SavedPass`.
        kept: See `SavedPass`.
        own: A, B and m of each adapter.
        keeps_output: Whether y is x W(t)^T + b, which it is not with dropout, and may be kept.
        unsafe: See `SavedPass`.
    """
    y = y.data  # not a view to autograd
    ctx.options, ctx.dtype, ctx.adapters, ctx.unsafe, ctx.counter, alias = options, dtype, adapters, unsafe, None, None
    wants_dm = len(own) == 3 and adapters[0].strength == 1 and ctx.needs_input_grad[FIRST_MAGNITUDE]
    if wants_dm and keeps_output and options.save_output:
        if torch.compiler.is_compiling():
            alias = y.clone()  # a compiled graph has no version counters
        else:
            alias = y.data
            if not y.is_inference():
                ctx.counter = y.detach()
                ctx.counter.data = y.new_empty(0)
                ctx.version = ctx.counter._version
    ctx.save_for_backward(x, weight if options.restore is None else None, bias, kept, alias, *own)
    return y


def load(ctx: Any) -> SavedPass:
    """Loads the tensors of `save`, without an output that was overwritten since.

    Raises:
        ValueError: The weight requires a gradient.
    """
    restore = ctx.options.restore
    _, _, _, needs_x, needs_dropped, needs_weight, needs_bias, *needs = ctx.needs_input_grad
    if needs_weight:
        raise ValueError("the weight of an adapted layer gets no gradient: set its requires_grad to False")
    x, weight, bias, kept, y, *own = ctx.saved_tensors
    if ctx.counter is not None and ctx.counter._version != ctx.version:
        y = None
    weight, adapters = weight if restore is None else restore(), with_tensors(ctx.adapters, own)
    tensors = x, weight, bias, kept, y, ctx.unsafe, adapters
    return SavedPass(ctx.options, ctx.dtype, *tensors, needs_x, needs_dropped, needs_bias, needs)

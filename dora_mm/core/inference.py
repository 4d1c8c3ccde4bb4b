"""Passes in eval mode without gradients: what they share as long as no parameter changes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_mm.core.functional import Adapter, adapter_dtype, cast
from dora_mm.core.ops import BLOCK, LINEAR, Op, per_row
from dora_mm.core.passes import PassCache


class KeptPasses(NamedTuple):
    """The values that inference passes of one layer share.

    Attributes:
        made_of: The key of the values: versions of the parameters, see `versions_of`, settings and strengths.
        adapters: The adapters.
        caches: The caches, by dtype and device of the product and by inference mode.
        storages: See `storages_of`.
    """

    made_of: Hashable
    adapters: Sequence[Adapter]
    caches: dict[Hashable, PassCache]
    storages: Sequence[StorageWeakRef]


class InferenceFactors(NamedTuple):
    """The adapters of a layer in the unmerged form, y = e x W0^T + b + h B'^T: see core/forms.py.

    Attributes:
        A: [A_1; A_2; ...], or None.
        B: B' (O, R), or None.
        gain: e (O,), or None for 1.
        shift: (1 - e) b (O,), or None for 0.
    """

    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None
    shift: Tensor | None


def unmerged_inference(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, factors: InferenceFactors) -> Tensor:
    """Computes y = e (x W0^T + b) + (1 - e) b + h B'^T, in half precision from the rounded output of the base layer.

    Args:
        op: The operation of the layer.
        x: Its input.
        weight: W0 in the dtype of the product.
        bias: b (O,) in that dtype, or None.
        factors: The adapters.

    Returns:
        y, of the shape and dtype that the base layer returns.
    """
    A, B, gain, shift = factors
    base = op(x, weight, bias)
    if gain is None:
        y = cast(base, adapter_dtype(base.dtype))
    else:
        e = per_row(op, gain, base)
        y = base * e if shift is None else torch.addcmul(per_row(op, shift, base), base, e)
    if A is not None and B is not None:
        y = add_branch(op, y, x, A, B)
    return cast(y, base.dtype)


def add_branch(op: Op, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Adds x A^T B^T to y, in place where its layout allows that, and returns the sum."""
    if op is LINEAR and y.numel() <= BLOCK:
        # Few tokens: each call counts, and a product with R columns in bf16 takes three times as long as one in fp32.
        return y.add_(F.linear(F.linear(cast(x, A.dtype), A), B))
    h = op.reduce(x, cast(A, x.dtype) if op.merges else A)
    return op.add_expanded(y, cast(h, y.dtype), B)


def is_inference(module: nn.Module) -> bool:
    """Whether a pass may use what an earlier one has kept: in eval mode, without gradients, in a single process.

    FSDP2 gathers parameters into the same memory in each pass, and no version counts that.
    """
    if module.training or torch.is_grad_enabled():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


DENSE_TYPES = (Tensor, nn.Parameter)  # subclasses may consist of other tensors, and have no address of their own


def versions_of(tensors: Iterable[Any]) -> Hashable | None:
    """A key that changes with the tensors, except by writes to their `.data`; Nones among them are left out.

    It is valid as long as their `storages_of` are kept.

    None where no version is counted, as of tensors that were made in inference mode.
    """
    found = [STEPS.count()]
    for t in tensors:
        if t is not None:
            if t.is_inference():
                return None
            if type(t) in DENSE_TYPES:
                found += t.storage_offset(), t.untyped_storage()._cdata
            found += id(t), t._version
    return tuple(found)


def storages_of(tensors: Iterable[Any]) -> list[StorageWeakRef]:
    """Weak references to the storages of tensors: what holds them keeps memory from being taken for the same again.

    They hold no numbers. (References to the tensors themselves would keep `torch.utils.swap_tensors` from its work.)
    """
    return [StorageWeakRef(t.untyped_storage()) for t in tensors if type(t) in DENSE_TYPES]


class StepCounter:
    """Counts the steps of all optimizers of torch from its first use on: the fused ones change no version.

    Those of a subclass that leaves out `Optimizer.__init__` are not counted.
    """

    def __init__(self) -> None:
        self.number, self.hook = 0, None

    def count(self) -> int:
        """The number of steps so far."""
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self.add)
        return self.number

    def add(self, *_: Any) -> None:
        self.number += 1


STEPS = StepCounter()

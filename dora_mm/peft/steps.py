"""Once per optimizer step: row norms that all passes of a step share, and the callback of transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dora_mm.peft.fuse import FuseReport, fuse_peft, fused_of
from dora_mm.peft.layers import PassTensors, read

log = logging.getLogger(__name__)


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """A context in which base weights and adapters do not change: each row norm is computed once, when a pass needs it.

    It goes around the passes from one `optimizer.step()` to the next. A pass that finds a parameter changed computes
    its norm again, and a warning at the end says that an adapter changed. Where parameters are not at hand when it
    opens (FSDP2 gathers them in each pass), and under torch.compile, every pass computes its own.

    Args:
        model: A model after `fuse_peft`.
    """
    fixed = _FixedNorms(model)
    try:
        yield
        fixed.warn_of_changes()
    finally:
        fixed.close()


class _FixedNorms:
    """The state of one `fixed_norms` context: the fused variants, and the norms of their tensors at its start."""

    def __init__(self, model: nn.Module):
        self.variants, self.tensors = [], []
        for layer, name in fused_of(model):
            found = read(layer, name)
            if name in layer.active_adapters and isinstance(found, PassTensors):
                self.variants.append(layer.lora_variant[name])
                self.tensors += found.A, found.B, found.magnitude
        for variant in self.variants:
            variant.is_fixed, variant.kept = True, None
        self.before = lengths(self.tensors)

    def warn_of_changes(self) -> None:
        """Warns where an adapter is not what it was."""
        if not torch.equal(self.before, lengths(self.tensors)):
            log.warning("adapters changed while their row norms were kept: close fixed_norms before optimizer.step()")

    def close(self) -> None:
        """Forgets the norms."""
        for variant in self.variants:
            variant.is_fixed, variant.kept = False, None


@torch.no_grad()
def lengths(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, which training changes."""
    found = [torch.linalg.vector_norm(t.float()) for t in tensors]
    return torch.stack([norm.to(found[0].device) for norm in found]).nan_to_num() if found else torch.empty(0)


class FusePeft(TrainerCallback):
    """`fuse_peft` for transformers' Trainer and those of TRL: `SFTTrainer(..., callbacks=[FusePeft()])`.

    The model is fused when training begins, and row norms are computed once per optimizer step, over however many
    batches gradients are accumulated. The first process prints the report.

    Attributes:
        report: The report, once training has begun.
    """

    report: FuseReport | None = None
    _fixed: _FixedNorms | None = None

    def __init__(self, *_: Any):
        """Takes what trainers give to callbacks that they make themselves (ms-swift: arguments and trainer)."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Fuses the model."""
        self._forget()
        self.report = fuse_peft(model)
        if state.is_world_process_zero:
            print(self.report)

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Keeps row norms from here on, for the passes of the first step."""
        self._keep(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Forgets them before parameters change."""
        if self._fixed is not None:
            self._fixed.warn_of_changes()
        self._forget()

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        """Keeps those of the next step."""
        self._keep(model)

    def on_train_end(self, args, state, control, **kwargs):
        """Forgets them; `load_best_model_at_end` may have loaded other parameters."""
        self._forget()

    def _keep(self, model: nn.Module) -> None:
        if self._fixed is None:
            self._fixed = _FixedNorms(model)

    def _forget(self) -> None:
        if self._fixed is not None:
            self._fixed.close()
        self._fixed = None

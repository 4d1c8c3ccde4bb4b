"""Once per optimizer step: row norms that all passes of a step share, and the callback of transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dora_mm.peft.fuse import FuseReport, fuse_peft, fused_of
from dora_mm.peft.layers import PassTensors, read, rows_of

log = logging.getLogger(__name__)


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """A context in which base weights and adapters do not change: row norms are computed once, when it opens.

    It goes around the passes from one `optimizer.step()` to the next. A pass that finds a parameter changed computes
    its own norm, and a warning at the end says that an adapter changed. Where parameters are not at hand when it opens
    (FSDP2 gathers them in each pass), every pass computes its own.

    Args:
        model: A model after `fuse_peft`.
    """
    kept, tensors = [], []
    for layer, name in fused_of(model):
        found = read(layer, name)
        if name in layer.active_adapters and isinstance(found, PassTensors):
            kept.append(layer.lora_variant[name])
            kept[-1].step_rows = rows_of(layer, found)
            tensors += found.A, found.B, found.magnitude
    before = lengths(tensors)
    try:
        yield
        if not torch.equal(before, lengths(tensors)):
            log.warning("adapters changed while their row norms were kept: close fixed_norms before optimizer.step()")
    finally:
        for variant in kept:
            variant.step_rows = None


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

    def __init__(self) -> None:
        self._step = ExitStack()

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Fuses the model."""
        self.report = fuse_peft(model)
        if state.is_world_process_zero:
            print(self.report)

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Computes the row norms."""
        self._step.close()
        self._step.enter_context(fixed_norms(model))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Forgets them before parameters change."""
        self._step.close()

    def on_train_end(self, args, state, control, **kwargs):
        """Forgets them where training ended within a step."""
        self._step.close()

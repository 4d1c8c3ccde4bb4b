"""Logits and losses of target tokens alone: what the head, the last layer of a model, is given of a pass.

A model computes logits of all columns, also of those where nothing is learned. Here its head is given the hidden states
of the target tokens alone, of all rows in one: (1, N, H). Whatever the class does with logits, such as a cap, it does
with (1, N, V). Where it returns them as its head does, they need not all exist at once: their losses are computed
beside the head, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.forms import Form

CHUNK = 1 << 24  # logits that are computed at once
# Types whose classes go on with the logits of their head: they scale or mask them, or leave out columns. So do those
# that have a cap, of Gemma and others.
SHAPE_LOGITS = (
    *("aya_vision", "chameleon", "cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"),
    "falcon_h1",
    *("granite", "granite4_vision", "granite_docling", "granite_swa", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "hyperclovax", "hyperclovax_vision_v2", "inkling2", "inkling2_loop"),
    *("inkling2_loop_text", "inkling2_text", "inkling_mm_model", "inkling_text", "muse_glimmer", "muse_spark"),
    *("nemotron_h", "nemotron_h_omni", "recurrent_gemma", "xlstm"),
)


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits of a model, or of the language model in it; None: it is not known."""
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((head for module in inner if (head := module.get_output_embeddings()) is not None), None)


def returns_logits_of_head(model: Any) -> bool:
    """Whether the class of a model returns what its head computes, and the head is a plain linear layer.

    Args:
        model: The model, on any device, adapted or not.
    """
    text = model.config.get_text_config()
    shapes = model.config.model_type in SHAPE_LOGITS or getattr(text, "final_logit_softcapping", None) is not None
    return type(head_of(model)) is nn.Linear and not shapes


class Targets:
    """The target tokens of a batch, N in all.

    Args:
        targets: What the logits of each column of its rows predict, IGNORED where nothing is learned: (B, T).

    Attributes:
        rows: The row of each (N,).
        columns: Its column (N,).
        ids: The tokens (N,).
        shape: (B, T).
    """

    def __init__(self, targets: Tensor):
        self.rows, self.columns = (targets != IGNORED).nonzero(as_tuple=True)
        self.ids, self.shape = targets[self.rows, self.columns], targets.shape

    def of(self, columns: Tensor) -> Tensor:
        """Selects the outputs of these tokens, (N, X), from (B, T, X); of more columns (GIT), the last T count."""
        return columns[self.rows, self.columns + (columns.shape[1] - self.shape[1])]

    def by_row(self, losses: Tensor) -> Tensor:
        """Their losses (N,), summed over those of each row: (B,)."""
        return losses.new_zeros(self.shape).index_put((self.rows, self.columns), losses).sum(-1)


def target_logits(form: Form, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (N, V) of the N target tokens of a batch, and these (N,).

    Args:
        form: How the class computes answers.
        model: The model.
        inputs: A batch of B rows.
        labels: Token ids (B, T), IGNORED where there is no loss.
    """
    targets = Targets(form.targets(labels))
    return _logits(form, model, inputs, labels, targets), targets.ids


def _logits(form: Form, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, targets: Targets) -> Tensor:
    calls = []

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(module)
        return (targets.of(args[0])[None], *args[1:])

    with _hooked(head_of(model), select):
        logits = form.logits(model, inputs, labels)
    return logits[0] if calls else targets.of(logits)


class TargetLosses:
    """The losses of rows, summed over their target tokens.

    Args:
        form: How the class of a model computes answers.
        model: The model.
    """

    def __init__(self, form: Form, model: Any):
        self.form, self.model, self._shapes = form, model, False

    @property
    def in_chunks(self) -> bool:
        """Whether the head computes losses, in chunks, as far as is known."""
        return not self._shapes and returns_logits_of_head(self.model)

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, and the number of its target tokens, (B,) each; `target_logits` has the arguments."""
        targets = Targets(self.form.targets(labels))
        losses = self._from_head(inputs, labels, targets) if self.in_chunks else None
        if losses is None:
            losses = cross_entropy(_logits(self.form, self.model, inputs, labels, targets), targets.ids)
        return targets.by_row(losses), (labels != IGNORED).sum(-1)

    def _from_head(self, inputs: Mapping[str, Tensor], labels: Tensor, targets: Targets) -> Tensor | None:
        """The losses (N,) that the head computes; None if the model returns other logits, and from then on.

        That is of classes that SHAPE_LOGITS does not know. Where they have dropout, the second pass draws its own.
        """
        head: Any = head_of(self.model)
        found: list[tuple[Tensor, Tensor, int]] = []

        def empty(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden.append(targets.of(args[0]))
            return (hidden[0][None, :0], *args[1:])

        def compute(module: nn.Module, args: Any, logits: Tensor) -> None:
            found.append((chunked_losses(head, hidden[0], targets.ids), logits, logits._version))

        hidden: list[Tensor] = []
        with _hooked(head, empty, compute):
            logits = self.form.logits(self.model, inputs, labels)
        if len(found) == 1 and logits is found[0][1] and logits._version == found[0][2]:
            return found[0][0]
        self._shapes = True
        return None


def chunked_losses(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy (N,) of targets (N,) by the logits of hidden states (N, H), of which a chunk exists at a time.

    Several chunks are computed again for the gradient. So does torch's `linear_cross_entropy` (2.13) where it returns
    the losses of rows, but it rounds these to the dtype of the hidden states.
    """
    size = max(1, CHUNK // head.out_features)

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head.forward(hidden), targets)

    if len(hidden) <= size:
        return losses(hidden, targets)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    found: Any = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(found)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy (N,) of targets (N,) by logits (N, V), in float32 or wider."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


@contextmanager
def _hooked(
    head: nn.Module | None, before: Callable[..., Any], after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Hooks of a head for one pass of its model."""
    handles = [head.register_forward_pre_hook(before)] if head is not None else []
    handles += [head.register_forward_hook(after)] if head is not None and after is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

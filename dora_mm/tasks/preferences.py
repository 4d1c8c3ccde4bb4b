"""Preferences: the loss of pairs of answers against the model as its training started (direct preference optimization).

Shapes: B pairs. A ratio is the log-probability of an answer, less that by the reference, the model as the training
started: of a fresh adapter the model without it, which the same weights compute. Formulas: arXiv 2305.18290 (sigmoid,
and label smoothing in its section on noisy labels), 2403.00409 (robust), 2310.12036 (ipo, as TRL has it: its ratios are
means over tokens).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_mm.config.vl import PreferenceConfig, TrainVLConfig
from dora_mm.core import base_model, fixed_parameters
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.rows import OnBadData, RowTooLongError
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.models.vl.vl_model import VLModel, likeliest_answer
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.tasks.held_out import Precision
from dora_mm.utils.evaluating import Map, evaluating
from dora_mm.utils.losses import LossSum
from dora_mm.utils.progress import Progress

log = logging.getLogger(__name__)
Reference = Callable[[Any], Tensor]  # a batch of pairs -> log-probabilities of chosen and rejected answers (2, B)


def pair_losses(config: PreferenceConfig, ratios: Tensor, counts: Tensor) -> Tensor:
    """The loss of each pair (B,).

    Args:
        config: The `preference` section.
        ratios: Of chosen and rejected answers (2, B).
        counts: The tokens of these (2, B).
    """
    if config.loss == "ipo":
        chosen, rejected = ratios / counts
        return (chosen - rejected - 1 / (2 * config.beta)).square()
    margins, smoothing = config.beta * (ratios[0] - ratios[1]), config.label_smoothing
    right, wrong = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    if config.loss == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


class Preferences:
    """The loss of batches of all tasks, and the margins of pairs.

    Args:
        model: The model.
        config: The `preference` section.
        reference: Computes, or knows, what the model as the training started says of a batch.
    """

    def __init__(self, model: VLModel, config: PreferenceConfig, reference: Reference):
        self.model, self.config, self.reference = model, config, reference

    def loss(self, batch: Any, generator: torch.Generator) -> LossSum:
        """The loss of a batch: of pairs the sum of theirs, and their number; of others see `VLModel.loss`."""
        if not TASKS[batch.task].pairs:
            return self.model.loss(batch, generator)
        ratios, counts = self._ratios(batch)
        losses = pair_losses(self.config, ratios, counts)
        return LossSum(losses.sum(), torch.ones_like(losses).sum())

    def margins(self, batch: Any) -> Tensor:
        """The reward margin of each pair (B,): beta times the gain of chosen over rejected against the reference."""
        ratios, _ = self._ratios(batch)
        return self.config.beta * (ratios[0] - ratios[1])

    @property
    def kept(self) -> KeptReference | None:
        """The reference, where it is computed before the first step, and a part of checkpoints."""
        return self.reference if isinstance(self.reference, KeptReference) else None

    def _ratios(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The ratios of chosen and rejected answers, and their tokens: (2, B) each."""
        reference = self.reference(batch)  # first, since what a gradient needs is kept from then on
        sums, counts = self.model.row_losses(batch)
        return -by_answer(sums) - reference.to(sums.device), by_answer(counts)

    @torch.no_grad()
    def answer(self, task: str, examples: Sequence[Example], images: str | None) -> list[str]:
        """The margin of each pair, as its answer that `eval/vl/preferences.py` scores.

        Raises:
            RowTooLongError: Nothing of an answer is within the length of rows.
            ValueError: A row cannot be encoded.
        """
        margins = self.margins(pairs_of(self.model, task, examples, images, "stop")).tolist()
        if len(margins) < len(examples):
            raise RowTooLongError(f"row {examples[0].id} of {task}: one of its answers is beyond the length of rows")
        return [f"{margin:.9g}" for margin in margins]


def preferences_of(model: VLModel, config: TrainVLConfig) -> Preferences:
    """The losses of a training. Where the model starts as no model without adapters is, what it says then is kept."""
    paired = any(TASKS[task.task].pairs for task in config.data.all_tasks)
    kept = paired and not config.adapter.starts_as_base
    return Preferences(model, config.preference, KeptReference() if kept else without_adapters(model))


def pairs_of(model: VLModel, task: str, examples: Sequence[Example], images: str | None, on_bad_data: OnBadData) -> Any:
    """A batch of pairs."""
    targets = [(likeliest_answer(example), 1.0) for example in examples]
    return model.batch(task, examples, images, targets, on_bad_data=on_bad_data)


def by_answer(values: Tensor) -> Tensor:
    """Values of rows of pairs, all chosen ones before the rejected ones, as (2, B)."""
    return values.view(2, len(values) // 2)


# --- the model as the training started -------------------------------------------------------------------------------


def without_adapters(model: VLModel) -> Reference:
    """The reference of a fresh adapter: the model without it, bit for bit, and without dropout."""

    def log_probabilities(batch: Any) -> Tensor:
        with evaluating(model.networks.values()) as together, base_model(together):
            return -by_answer(model.row_losses(batch)[0])

    return log_probabilities


class KeptReference:
    """Log-probabilities of all pairs by the model at the start of a training; a part of its checkpoints.

    It serves where the weights at the start are not those without adapters. A pair is identified by its conversations
    and the names of its images; the day of its rows is that of the checkpoint, see `RowCounts`.
    """

    def __init__(self):
        self._values: dict[int, tuple[float, float]] = {}

    def __call__(self, batch: Any) -> Tensor:
        known = [self._values[_key(example)] for example in batch.examples]
        return torch.tensor(known).view(-1, 2).T

    def compute(
        self,
        model: VLModel,
        sets: Mapping[str, TrainingSet | ValidationSet],
        batch_size: int,
        *,
        on_bad_data: OnBadData,
        limit: int | None = None,
        precision: Precision = nullcontext,
        mapped: Map = map,
    ) -> None:
        """Computes the log-probabilities of all pairs of some tables; those that cannot be encoded are left out.

        Args:
            model: The model as it is now.
            sets: The tables by task name.
            batch_size: Pairs per pass.
            on_bad_data: See `VLModel.batch`.
            limit: At most so many rows of each; None: all.
            precision: Opens the autocast of the training.
            mapped: Computes batches; other than `map` where several processes share them.

        Raises:
            ValueError: A row cannot be encoded and `on_bad_data` is "stop".
        """

        def known(name: str, found: TrainingSet | ValidationSet, rows: range) -> list[tuple[int, float, float]]:
            batch = pairs_of(model, name, [found.table[row] for row in rows], found.images, on_bad_data)
            with precision():
                chosen, rejected = -by_answer(model.row_losses(batch)[0])
            progress.advance()
            return [*zip(map(_key, batch.examples), chosen.tolist(), rejected.tolist(), strict=True)]

        paired = {name: found for name, found in sets.items() if TASKS[name].pairs}
        if not paired:
            return
        with evaluating(model.networks.values()) as together, fixed_parameters(together):
            for name, found in paired.items():
                count = min(len(found.table), limit or len(found.table))
                slices = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
                with Progress(f"{name} by the model as it starts", len(slices), "batches") as progress:
                    for done, values in enumerate(mapped(partial(known, name, found), slices), start=1):
                        self._values |= {key: (chosen, rejected) for key, chosen, rejected in values}
                        progress.done = max(progress.done, done)

    def state_dict(self) -> dict[str, Tensor]:
        keys = torch.tensor([*self._values], dtype=torch.int64)
        return {"keys": keys, "log_probabilities": torch.tensor([*self._values.values()]).view(-1, 2)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        values = state_dict["log_probabilities"].tolist()
        self._values = {
            key: (one, other) for key, (one, other) in zip(state_dict["keys"].tolist(), values, strict=True)
        }


def _key(example: Example) -> int:
    """The hash that identifies a pair: 64 bits, of which two of a million are alike once in 40 million runs."""
    images = [PurePath(name).name for name in example.images]
    content = repr((images, [*map(tuple, example.turns)], [*map(tuple, example.rejected)], example.tools))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big", signed=True)

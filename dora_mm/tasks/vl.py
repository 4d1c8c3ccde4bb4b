"""Batches of vision-language trainings, and what answers a split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.answers import Answer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.mixing import Mixture, TaskBatches
from dora_mm.data.vl.rows import OnBadData
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.models.vl.vl_model import Target, VLModel
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.tasks.preferences import Preferences
from dora_mm.utils.randomness import generator


def answerers(
    model: VLModel, sets: Mapping[str, ValidationSet], config: DecodeConfig, preferences: Preferences | None = None
) -> dict[str, Answer]:
    """The functions that answer the examples of each split, by task name.

    Args:
        model: The model.
        sets: The splits by task name.
        config: The decoding settings.
        preferences: Answers pairs by their margins; None: there are none.

    Raises:
        ValueError: The model cannot do a task, or a task needs candidates and its split has none.
    """
    model.check(sets)
    found: dict[str, Answer] = {}
    for name, split in sets.items():
        if TASKS[name].pairs:
            assert preferences is not None, name
            found[name] = partial(preferences.answer, name)
        else:
            found[name] = model.answerer(name, config, split.candidates)
    return found


class VLBatches:
    """Maps the number of a micro-batch to this process's share of it; depends only on (seed, number, process).

    The micro-batches of an optimizer step, on all processes, are consecutive slices of the batch that one process would
    take without accumulation whose batches are as large as theirs together. So a step has one task, and the same rows
    and answers are learned, however a step is cut.

    Args:
        model: Builds the batches.
        sets: The training sets by task name.
        seed: Seed of the order and of sampled answers.
        on_bad_data: What is done with a row that cannot be encoded, see `VLModel.batch`.
        accumulated: Micro-batches per optimizer step.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self,
        model: VLModel,
        sets: Mapping[str, TrainingSet],
        *,
        seed: int,
        on_bad_data: OnBadData = "stop",
        accumulated: int = 1,
        process: tuple[int, int] = (0, 1),
    ):
        self.model, self.sets, self.seed = model, sets, seed
        self.on_bad_data: OnBadData = on_bad_data
        self.accumulated, self.process = accumulated, process
        num_slices = accumulated * process[1]
        self.order = TaskBatches(
            {name: _rows(name, training_set, seed) for name, training_set in sets.items()},
            {name: training_set.batch_size * num_slices for name, training_set in sets.items()},
            weights={name: training_set.weight for name, training_set in sets.items()},
            seed=seed,
            lengths={name: found.lengths for name, found in sets.items() if found.lengths is not None},
        )

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in one pass over the rows of all tasks."""
        return self.order.batches_per_epoch

    def __call__(self, number: int) -> Any:
        """This process's share of the micro-batch of this number."""
        step, micro = divmod(number, self.accumulated)
        name, rows = self.order(step)
        training_set = self.sets[name]
        uniforms = torch.rand(len(rows), generator=generator(self.seed, step, "answers")).tolist()
        index, num_processes = self.process
        start = (micro * num_processes + index) * training_set.batch_size
        share = slice(start, start + training_set.batch_size)
        examples = [training_set.table[row] for row in rows[share]]
        targets = [sample_answer(example, uniform) for example, uniform in zip(examples, uniforms[share], strict=True)]
        return self.model.batch(name, examples, training_set.images, targets, on_bad_data=self.on_bad_data)


def _rows(name: str, rows: TrainingSet, seed: int) -> int | Mixture:
    """The number of rows of a task, or their mixture where they have several sources."""
    if len(rows.source_weights) < 2:
        return len(rows.table)
    return Mixture(name, rows.table.by_source(), rows.source_weights, seed=seed)


def sample_answer(example: Example, uniform: float) -> Target:
    """Draws an answer in proportion to the scores.

    Args:
        example: The example.
        uniform: A random number, from 0 to below 1.

    Returns:
        The answer with its score, or ("", 0.0) if all scores are 0; ("", 1.0) of a conversation that ends with a
        question and has learned answers before it.
    """
    if not example.scores and any(turn.loss for turn in example.turns):
        return "", 1.0
    totals = list(accumulate(example.scores))
    if not totals or not totals[-1]:
        return "", 0.0
    index = bisect_right(totals, uniform * totals[-1])
    return example.answers[index], float(example.scores[index])

"""What training, validation, answering and comparing need of a family of vision-language models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from dora_mm.config.vl import DecodeConfig
from dora_mm.core import TargetMap
from dora_mm.data.vl.example import Answer, Example
from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.utils.randomness import generator


class VLModel(Protocol):
    """A vision-language model with all that turns examples into losses and answers.

    A family of models implements it, and is then trained, scored and compared by the same pipelines.
    """

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that may be adapted, by component: "model", and the parts of the model that are outside it."""
        ...

    @property
    def target_maps(self) -> Mapping[str, TargetMap]:
        """The target map of each of these networks. No two have a part of the same name."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of the base weights, and of all else on which an adapter depends, by keys of an adapter's header."""
        ...

    @property
    def prepares_batches(self) -> bool:
        """Whether `batch` only prepares data, so that it may run beside a training step."""
        ...

    def fresh(self, seed: int) -> VLModel:
        """Loads the bare model again, as a training with this seed starts from; parts that it can share are shared."""
        ...

    def check(self, tasks: Iterable[str]) -> None:
        """Checks that the model can do these tasks.

        Raises:
            ValueError: It cannot do one of them.
        """
        ...

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        """A table of the rows that the model can read: their images can be encoded, and are not too many or too few.

        Raises:
            ValueError: A row cannot be read and the table's `on_bad_data` is "stop", or none can.
        """
        ...

    def batch(self, task: str, examples: Sequence[Example], images: str | None, stream: torch.Generator) -> Any:
        """Builds a training batch.

        Args:
            task: Name of the task.
            examples: B examples. One answer of each is drawn in proportion to the scores.
            images: The folder of the images; None where there are none, or features are read.
            stream: Source of the draws.

        Raises:
            ValueError: An image cannot be read, or a row cannot be encoded.
        """
        ...

    def loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss of a batch: a scalar, float32."""
        ...

    def answerer(self, task: str, config: DecodeConfig, candidates: Sequence[str]) -> Answer:
        """Builds the function that answers the examples of a task.

        Args:
            task: Name of the task.
            config: The decoding settings.
            candidates: The permitted answers, where the settings ask for them.

        Raises:
            ValueError: The model cannot decode like this, or candidates are needed and there are none.
        """
        ...


def answerers(model: VLModel, sets: Mapping[str, ValidationSet], config: DecodeConfig) -> dict[str, Answer]:
    """The functions that answer the examples of each split, by task name.

    Args:
        model: The model.
        sets: The splits by task name.
        config: The decoding settings.

    Raises:
        ValueError: The model cannot do a task, or a task needs candidates and its split has none.
    """
    model.check(sets)
    return {name: model.answerer(name, config, split.candidates) for name, split in sets.items()}


class VLBatches:
    """Maps a batch number to a batch of one task, which depends only on (seed, number, process).

    Args:
        model: Builds the batches.
        sets: The training sets by task name.
        seed: Seed of the order and of drawn answers.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self, model: VLModel, sets: Mapping[str, TrainingSet], *, seed: int, process: tuple[int, int] = (0, 1)
    ):
        self.model, self.sets, self.seed, self.process = model, sets, seed, process
        self.order = TaskBatches(
            {name: len(training_set.table) for name, training_set in sets.items()},
            {name: training_set.batch_size for name, training_set in sets.items()},
            weights={name: training_set.weight for name, training_set in sets.items()},
            seed=seed,
        )

    @property
    def per_epoch(self) -> int:
        """This process's number of batches in one pass over the rows of all tasks."""
        return -(-self.order.batches_per_epoch // self.process[1])

    def __call__(self, number: int) -> Any:
        """This process's batch of this number."""
        index, count = self.process
        number = number * count + index
        name, rows = self.order(number)
        training_set = self.sets[name]
        stream = generator(self.seed, number, "answers")
        return self.model.batch(name, [training_set.table[row] for row in rows], training_set.images, stream)


def draw_answer(example: Example, stream: torch.Generator) -> tuple[str, float]:
    """Draws an answer in proportion to the scores; returns it with its score, or ("", 0.0) if all scores are 0."""
    if not sum(example.scores):
        return "", 0.0
    index = int(torch.multinomial(torch.tensor(example.scores), 1, generator=stream))
    return example.answers[index], float(example.scores[index])


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """A mean over the rows or tokens of all processes, as this process's share of it.

    Gradients are averaged over processes, which hold different numbers of tokens: the mean of their means would be
    another loss than that of one process with the whole batch.

    Args:
        total: The sum over this process's rows or tokens, ().
        count: Their number, ().

    Returns:
        (), whose mean over processes is the sum of all totals over the sum of all counts.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        count = count.detach().clone()
        distributed.all_reduce(count)
        return total * distributed.get_world_size() / count.clamp(min=1)
    return total / count.clamp(min=1)

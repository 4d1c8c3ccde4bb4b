"""What training, validation, answering and comparing need of a family of vision-language models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import VIDEO_TASKS
from dora_mm.core import TargetMap
from dora_mm.data.vl.example import Answer, Example
from dora_mm.data.vl.mixing import TaskBatches
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.tasks.lengths import RowLengths
from dora_mm.tasks.shown import ShownRow
from dora_mm.utils.randomness import generator

Target = tuple[str, float]  # a text to learn, and the weight of its row's loss
# Tasks whose loss is a mean over rows of the means over their tokens; in the others it is a mean over all tokens.
ROW_MEANS = ("vqa", "gqa", *VIDEO_TASKS)


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
    def num_cut(self) -> int:
        """How many rows whose loss was computed lost text, because they were too long; a training sets it."""
        ...

    @num_cut.setter
    def num_cut(self, number: int) -> None: ...

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

    def batch(self, task: str, examples: Sequence[Example], images: str | None, targets: Sequence[Target]) -> Any:
        """Builds a training batch.

        Args:
            task: Name of the task.
            examples: B examples.
            images: The folder of the images; None where there are none, or features are read.
            targets: The answer to learn of each.

        Raises:
            ValueError: An image cannot be read, or a row cannot be encoded.
        """
        ...

    def loss(self, batch: Any, generator: torch.Generator) -> Tensor:
        """The loss of a batch: a scalar, float32."""
        ...

    def lengths(self, task: str, table: ExampleTable, images: str | None, *, texts: bool = True) -> RowLengths | None:
        """The lengths of rows in tokens, as `batch` would encode them; no weights are needed.

        Args:
            task: Name of the task.
            table: The rows.
            images: The folder of their images.
            texts: Whether to count the texts as well; False counts the images alone, which takes less time.

        Returns:
            The lengths, each row with its likeliest answer; None for a family whose images have a fixed number of
            tokens, and its texts a length of their own.
        """
        ...

    def shown(self, task: str, example: Example, images: str | None) -> ShownRow:
        """A row as the model sees it, with its likeliest answer; no weights are needed.

        Raises:
            ValueError: As `batch`.
        """
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
    """Maps a batch number to this process's share of a batch of one task; depends only on (seed, number, process).

    Several processes take consecutive slices of the batch that one process would take whose batches are as large as
    theirs together. So in every step all have the same task, and the same rows and answers are learned, however many
    processes there are.

    Args:
        model: Builds the batches.
        sets: The training sets by task name.
        seed: Seed of the order and of drawn answers.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self, model: VLModel, sets: Mapping[str, TrainingSet], *, seed: int, process: tuple[int, int] = (0, 1)
    ):
        self.model, self.sets, self.seed = model, sets, seed
        self.index, num_processes = process
        self.order = TaskBatches(
            {name: len(training_set.table) for name, training_set in sets.items()},
            {name: training_set.batch_size * num_processes for name, training_set in sets.items()},
            weights={name: training_set.weight for name, training_set in sets.items()},
            seed=seed,
        )

    @property
    def per_epoch(self) -> int:
        """The number of batches in one pass over the rows of all tasks."""
        return self.order.batches_per_epoch

    def __call__(self, number: int) -> Any:
        """This process's share of the batch of this number."""
        name, rows = self.order(number)
        training_set = self.sets[name]
        draws = torch.rand(len(rows), generator=generator(self.seed, number, "answers")).tolist()
        start = self.index * training_set.batch_size
        share = slice(start, start + training_set.batch_size)
        examples = [training_set.table[row] for row in rows[share]]
        targets = [draw_answer(example, draw) for example, draw in zip(examples, draws[share], strict=True)]
        return self.model.batch(name, examples, training_set.images, targets)


class RowsCut:
    """The number of rows that a training has cut, as a part of its checkpoints.

    Of several processes the first one writes checkpoints, and each goes on from its number.
    """

    def __init__(self, model: VLModel):
        self.model = model

    def state_dict(self) -> dict[str, int]:
        return {"num_cut": self.model.num_cut}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.model.num_cut = state_dict["num_cut"]


def draw_answer(example: Example, draw: float) -> Target:
    """Draws an answer in proportion to the scores.

    Args:
        example: The example.
        draw: A random number, from 0 to below 1.

    Returns:
        The answer with its score, or ("", 0.0) if all scores are 0.
    """
    totals = list(accumulate(example.scores))
    if not totals or not totals[-1]:
        return "", 0.0
    index = bisect_right(totals, draw * totals[-1])
    return example.answers[index], float(example.scores[index])


def likeliest_answer(example: Example) -> str:
    """The answer that is drawn most often; "" if all scores are 0."""
    best = max(example.scores, default=0.0)
    return example.answers[example.scores.index(best)] if best else ""


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

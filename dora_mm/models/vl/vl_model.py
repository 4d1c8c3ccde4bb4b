"""Interface of vision-language model families for training, validation, answering and comparing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from dora_mm.config.models import VisionConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.core import TargetMap
from dora_mm.data.seen import SeenFiles
from dora_mm.data.vl.answers import Answer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.row_view import RowView
from dora_mm.data.vl.rows import OnBadData
from dora_mm.data.vl.splits import TrainingSet, ValidationSet
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.identity import ModelIdentity
from dora_mm.models.vl.row_counts import RowCounts
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.day import Day
from dora_mm.utils.losses import LossSum

log = logging.getLogger(__name__)
Target = tuple[str, float]  # a text to learn, and the weight of its row's loss


@dataclass(frozen=True)
class RowLengths:
    """The lengths of rows of a table in tokens, before and after they are cut.

    Attributes:
        rows: The rows of the table that were encoded (N,).
        tokens: The tokens of each before anything is cut (N,).
        image_tokens: How many of these stand for images (N,).
        tokens_read: How many of them the model reads (N,); 0 of a row that is left out.
        exchanges_cut: How many whole exchanges, the last ones of a conversation, each loses (N,).
        loses_answer: Whether nothing of the answers is left of a row that is cut, which is left out (N,), bool.
        limit: The number of tokens that a row may have.
        limit_from: What sets it: a key of the config, or the model.
        bad: Why other rows cannot be encoded, by their index in the table.
    """

    rows: np.ndarray
    tokens: np.ndarray
    image_tokens: np.ndarray
    tokens_read: np.ndarray
    exchanges_cut: np.ndarray
    loses_answer: np.ndarray
    limit: int
    limit_from: str
    bad: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """A model without its weights.

    Attributes:
        networks: Its networks, on the meta device, by component.
        target_maps: Their target maps.
        row_losses: The losses of the rows of a batch of a model of this family, see `VLModel.row_losses`, by these
            networks; None: it needs more.
    """

    networks: Mapping[str, nn.Module]
    target_maps: Mapping[str, TargetMap]
    row_losses: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] | None = None


class VLModel(Protocol):
    """A vision-language model with all that turns examples into losses and answers.

    A family of models implements it, and is then trained, scored and compared by the same pipelines.
    """

    opens_without_weights: ClassVar[bool]  # whether a loaded model reads rows though its weights are not here

    @classmethod
    def load(
        cls, config: Any, vision_config: VisionConfig, *, seed: int, trained_tower: bool, device: torch.device | str
    ) -> VLModel:
        """Loads the model that the family's `model` section names: see `families.load_vl_model`."""
        ...

    @classmethod
    def interactive_settings(cls, path: str, run: Any | None, given: Mapping[str, str]) -> dict[str, Any]:
        """The keys that a single question changes in the `model` section of a run; without a run, those that it sets.

        Args:
            path: The model: a folder, or a hub name.
            run: The `model` section of a run of this family; None: there is none.
            given: A `dtype` or `revision` that replaces that of the run.

        Raises:
            ValueError: The family needs a run, or has no such keys.
        """
        ...

    @classmethod
    def is_local(cls, config: Any, vision: VisionConfig) -> bool:
        """Whether all that the model is loaded from is on this machine."""
        ...

    @classmethod
    def structure(cls, config: Any, vision: VisionConfig, *, tower: bool) -> Structure:
        """The networks from their configs alone: see `families.structure_of`."""
        ...

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that may be adapted, by component: "model", and the parts of the model that are outside it."""
        ...

    @property
    def target_maps(self) -> Mapping[str, TargetMap]:
        """The target map of each of these networks. No two have a part of the same name."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """The content of all that it was loaded from; the names of weights are keys of an adapter's header."""
        ...

    @property
    def counts(self) -> RowCounts:
        """The rows whose loss was computed that lost text, or are missing in their batches."""
        ...

    @property
    def files(self) -> SeenFiles:
        """The content of the images, videos or features that it has read: a part of the checkpoints of a training."""
        ...

    @property
    def day(self) -> Day:
        """The day that its chat template may ask for, and how often it has."""
        ...

    @property
    def question_task(self) -> str:
        """The task of a question that is not of a data set."""
        ...

    @property
    def reads_images(self) -> bool:
        """Whether its rows may have images; False: of a language model."""
        ...

    @property
    def pipeline_tag(self) -> str:
        """The pipeline tag of the Hugging Face Hub, for model cards."""
        ...

    @property
    def reads_several(self) -> bool:
        """Whether such a question may have several images."""
        ...

    @property
    def converses(self) -> bool:
        """Whether it reads system turns, several questions, and texts without an image."""
        ...

    @property
    def prepares_batches(self) -> bool:
        """Whether `batch` only prepares data, so that it may run beside a training step."""
        ...

    @property
    def nonuniform_reason(self) -> str | None:
        """Why processes with different batches may run other modules, or in another order; None if they never do."""
        ...

    def check_in_step(self, task: str, table: ExampleTable, images: str | None) -> None:
        """Checks that several processes, each with batches of these rows, run the same modules in the same order.

        Args:
            task: Name of the task.
            table: Its rows.
            images: The folder of their images.

        Raises:
            ValueError: They do not, of this model with videos among the rows; or a video cannot be read.
        """
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

    def batch(
        self,
        task: str,
        examples: Sequence[Example],
        images: str | None,
        targets: Sequence[Target],
        *,
        on_bad_data: OnBadData = "stop",
    ) -> Any:
        """Builds a training batch. Its rows are the examples, each with its answer.

        Of a task with `pairs`, of which only some families do one, they are the examples with their chosen answers and
        behind these all with their rejected ones; where one of both cannot be encoded, the example is left out.

        Args:
            task: Name of the task.
            examples: B examples.
            images: The folder of the images; None where there are none, or features are read.
            targets: The answer to learn of each.
            on_bad_data: "skip" leaves out a row that cannot be encoded, for example because its image is damaged;
                VL-BART has no such rows. One whose whole answer is cut is always left out.

        Raises:
            ValueError: An image cannot be read, or a row cannot be encoded and `on_bad_data` is "stop".
        """
        ...

    def row_losses(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each row of a batch, summed over its target tokens, and their number: (B,) each."""
        ...

    def loss(self, batch: Any, generator: torch.Generator) -> LossSum:
        """The loss of a batch of one task without `pairs`.

        Of a task with `row_mean` it is the sum of weight times mean over tokens of each row, and counts the rows; else
        the sum over the tokens of the answers, and counts these. A row without an answer, whose weight is 0, adds
        nothing to the sum, nor its tokens to the count. A batch without rows is a sum and a count of 0.
        """
        ...

    def lengths(self, task: str, table: ExampleTable, rows: Iterable[int], images: str | None) -> RowLengths | None:
        """The lengths of rows in tokens, as `batch` encodes them; no weights are needed.

        Args:
            task: Name of the task.
            table: The table of the rows.
            rows: Which of them are encoded, by index.
            images: The folder of their images.

        Returns:
            The lengths, each row with its likeliest answer; None for a family whose images have a fixed number of
            tokens, and its texts a length of their own.
        """
        ...

    def row_view(self, task: str, example: Example, images: str | None) -> RowView:
        """A row as the model sees it, with its likeliest answer; no weights are needed.

        Raises:
            ValueError: As `batch`.
        """
        ...

    def content(self, example: Example, images: str | None) -> str:
        """Content digest of the images, videos or features of a row; files without a known digest are read.

        Raises:
            OSError: A file cannot be read.
            ValueError: Features cannot be read.
        """
        ...

    def box_grid(self, size: tuple[int, int]) -> Sequence[int] | None:
        """The width and height of which the numbers count in boxes that it writes; None: it is not known.

        Args:
            size: The width and height of the image in pixels.
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


def weighted_loss(task: str, sums: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor) -> LossSum:
    """The loss of a batch, see `VLModel.loss`, from that of its rows.

    Args:
        task: Name of the task.
        sums: See `VLModel.row_losses` (B,).
        counts: See `VLModel.row_losses` (B,).
        weights: The weights of the rows (B,).
    """
    weights = weights.to(sums.device)
    if TASKS[task].row_mean:
        return LossSum((sums / counts.clamp(min=1) * weights).sum(), torch.ones_like(sums).sum())
    kept = (weights > 0).to(sums.dtype)
    return LossSum((sums * kept).sum(), (counts * kept).sum())


def likeliest_answer(example: Example) -> str:
    """The answer that is drawn most often; "" if all scores are 0."""
    best = max(example.scores, default=0.0)
    return example.answers[example.scores.index(best)] if best else ""


def check_in_step(model: VLModel, *sets: Mapping[str, TrainingSet | ValidationSet]) -> None:
    """Checks that processes that divide a model keep step, with the rows of all tasks as well.

    Raises:
        ValueError: They do not.
    """
    if why := model.nonuniform_reason:
        raise ValueError(f"train.shard: {why}, and the processes have to gather a block at the same time: leave it out")
    for name, found in (item for each in sets for item in each.items()):
        model.check_in_step(name, found.table, found.images)

"""Held-out losses: functions of the weights alone, without random sampling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_mm.config.vl import EvaluateConfig
from dora_mm.core import fixed_parameters
from dora_mm.data.images.wording import unchanged
from dora_mm.data.vl.example import Example, plain_text
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.utils.digest import file_digest
from dora_mm.utils.evaluating import evaluating, map_shared
from dora_mm.utils.example_losses import NUM_TIMES, ExampleLoss
from dora_mm.utils.losses import LossSum
from dora_mm.utils.progress import tracked
from dora_mm.utils.randomness import generator

if TYPE_CHECKING:  # these need the extra vl, and those who train images have none
    from dora_mm.data.vl.rows import OnBadData
    from dora_mm.data.vl.splits import TrainingSet, ValidationSet
    from dora_mm.data.vl.tables import ExampleTable
    from dora_mm.models.vl.vl_model import VLModel

Precision = Callable[..., AbstractContextManager[Any]]  # opens the autocast of a training


class ImageLosses:
    """The loss of fixed images: each at 8 times, with noise that depends on (image, number of the time) alone.

    The times are in the middle of eight equal shares of all times that a training samples, so that the mean is close to
    that of the training's loss; captions are never dropped.

    Args:
        task: The loss of a training.
        parts: The images by the name of their loss, with settings without random sampling.
        batch_size: Images per pass.
        precision: Opens the autocast of the training.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self,
        task: DiffusionTask,
        parts: Mapping[str, CaptionedBatches],
        *,
        batch_size: int,
        precision: Precision,
        process: tuple[int, int] = (0, 1),
    ):
        self.task, self.parts, self.precision, self.process = task, parts, precision, process
        self.batches = {name: self._batches(part, batch_size) for name, part in parts.items()}

    def __call__(self, networks: Sequence[nn.Module]) -> dict[str, float]:
        """The mean loss of each part; `networks` are those whose modes matter."""
        measured = {name: list(losses.values()) for name, losses in self._measured(networks).items()}
        return {name: fsum(losses) / len(losses) for name, losses in measured.items()}

    def by_image(self, networks: Sequence[nn.Module]) -> list[ExampleLoss]:
        """The losses of each image of all parts at each of its resolutions."""
        found = []
        for name, losses in self._measured(networks).items():
            for index, image in enumerate(self.parts[name].images):
                own = [losses[index, number] for number in range(NUM_TIMES)]
                about = {"path": str(image.path.absolute()), "digest": image.digest}
                text = unchanged(image, self.parts[name].config.captions)
                found.append(ExampleLoss(f"{image.digest} {text}", str(image.resolution), text, own, **about))
        return found

    def _measured(self, networks: Sequence[nn.Module]) -> dict[str, dict[tuple[int, int], float]]:
        """The loss by (image, number of the time) of each part."""
        found = {}
        with evaluating(networks) as together, fixed_parameters(together):
            for name, part in self.parts.items():
                batches = tracked(self.batches[name], name, "batches")
                shared = map_shared(partial(self._losses, part), batches, self.process, in_step=True)
                found[name] = dict(chain.from_iterable(shared))
        return found

    def _batches(self, part: CaptionedBatches, batch_size: int) -> list[list[tuple[int, int]]]:
        """Batches of (image, number of its time), each of images of one layout."""
        groups = defaultdict(list)
        for index, layout in enumerate(part.layouts):
            groups[layout] += [(index, number) for number in range(NUM_TIMES)]
        return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]

    def _losses(self, part: CaptionedBatches, rows: list[tuple[int, int]]) -> list[tuple[tuple[int, int], float]]:
        with self.precision():
            batch = part.fixed([index for index, _ in rows])
            noise = [
                self.task.sample_noise(
                    latents[None], generator(0, number, f"fixed noise of {part.images[index].digest}")
                )
                for latents, (index, number) in zip(batch.latents, rows, strict=True)
            ]
            shares = torch.tensor([(number + 0.5) / NUM_TIMES for _, number in rows])
            times = self.task.times_at(shares, batch.latents.shape[2:])
            return list(zip(rows, self.task.losses(batch, torch.cat(noise), times).tolist(), strict=True))


class RowLosses:
    """The loss of the rows of validation splits, each with its likeliest answer, which counts as a whole.

    Args:
        model: The model.
        sets: The splits by task name.
        training: The training sets, whose batch sizes fit into the memory.
        loss: The loss of a batch, as in the training.
        limit: At most so many rows of each; None: all.
        on_bad_data: What is done with a row that cannot be encoded, see `VLModel.batch`.
        precision: Opens the autocast of the training.
        process: (index, count) if several processes share the work.
    """

    def __init__(
        self,
        model: VLModel,
        sets: Mapping[str, ValidationSet],
        training: Mapping[str, TrainingSet],
        loss: Callable[[Any, torch.Generator], LossSum],
        *,
        limit: int | None,
        on_bad_data: OnBadData,
        precision: Precision,
        process: tuple[int, int] = (0, 1),
    ):
        self.model, self.sets, self.training, self.loss, self.limit = model, sets, training, loss, limit
        self.on_bad_data: OnBadData = on_bad_data
        self.precision, self.process = precision, process

    def __call__(self) -> dict[str, float]:
        """The loss of each task: the mean over rows or tokens, as in its training."""
        with evaluating(self.model.networks.values()) as together, fixed_parameters(together):
            return {name: self._loss(name, split) for name, split in self.sets.items()}

    def by_row(self) -> list[ExampleLoss]:
        """The loss of each row, in a pass of its own; without those that cannot be encoded."""
        with evaluating(self.model.networks.values()) as together, fixed_parameters(together):
            return [row for name, split in self.sets.items() for row in self._rows(name, split)]

    def _rows(self, name: str, split: ValidationSet) -> list[ExampleLoss]:
        table, found = self._answered(split), []
        single = tracked([range(row, row + 1) for row in range(len(table))], f"{name} loss of each row", "rows")
        sums = map_shared(partial(self._sums, name, table, split.images), single, self.process, in_step=True)
        for row, (total, count) in enumerate(sums):
            if count:
                example = table[row]
                about = {"answer": _shown_answer(example), **_image_of(example, split.images)}
                found.append(ExampleLoss(f"{name} {row}", name, _question(example), [total / count], **about))
        return found

    def _answered(self, split: ValidationSet) -> ExampleTable:
        return split.table.select(range(min(len(split.table), self.limit or len(split.table)))).answered()

    def _loss(self, name: str, split: ValidationSet) -> float:
        table = self._answered(split)
        size = self.training[name].batch_size
        batches = [range(start, min(start + size, len(table))) for start in range(0, len(table), size)]
        shown = tracked(batches, f"{name} loss", "batches")
        found = map_shared(partial(self._sums, name, table, split.images), shown, self.process, in_step=True)
        return fsum(total for total, _ in found) / max(1, fsum(count for _, count in found))

    def _sums(self, name: str, table: ExampleTable, images: str | None, rows: range) -> tuple[float, float]:
        from dora_mm.models.vl.vl_model import likeliest_answer

        examples = [table[row] for row in rows]
        targets = [(likeliest_answer(example), 1.0) for example in examples]
        batch = self.model.batch(name, examples, images, targets, on_bad_data=self.on_bad_data)
        with self.precision():
            loss = self.loss(batch, generator(0, 0, "held-out loss"))
        return float(loss.total), float(loss.count)


def _question(example: Example) -> str:
    """What a person reads of a row: its question, or the last turn that is not the answer."""
    return example.text or (plain_text(example.prompt_turns[-1].text) if example.prompt_turns else "")


def _shown_answer(example: Example) -> str:
    from dora_mm.models.vl.vl_model import likeliest_answer

    return likeliest_answer(example) or (plain_text(example.turns[-1].text) if example.turns else "")


def _image_of(example: Example, folder: str | None) -> dict[str, str]:
    """The file of the first image of a row, where there is one."""
    path = Path(folder or "", example.images[0]).absolute() if example.images else None
    return {"path": str(path), "digest": file_digest(path)} if path and path.is_file() else {}


def by_loss(config: EvaluateConfig, task: str) -> bool:
    """Whether the best adapter of a task is the one with the lowest held-out loss: where the config says so.

    It is also the default of conversations, whose metric is exact match of whole sentences.
    """
    return (config.best_by or ("loss" if TASKS[task].kind == "conversations" else "metric")) == "loss"

"""The splits of a config's tasks: rows, the folders of their pictures, and what may be answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dora_mm.config.vl import DecodeConfig, SourceConfig, VLDataConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.tables import ExampleTable, open_table


class ImageCheck(Protocol):
    """What knows which images can be encoded, such as a VisionEncoder."""

    def check(self, table: ExampleTable) -> ExampleTable:
        """The rows whose images can all be encoded. Raises ValueError, or warns, for others."""
        ...


@dataclass(frozen=True)
class TrainingSet:
    """The rows of one task, and where their pictures lie."""

    table: ExampleTable
    images: str | None
    batch_size: int
    weight: float = 1.0


@dataclass(frozen=True)
class ValidationSet:
    """candidates: the answers that `decode.answers` trie and rank choose from."""

    table: ExampleTable
    images: str | None
    candidates: tuple[str, ...] = ()


def open_source(source: SourceConfig, data: VLDataConfig, vision: ImageCheck) -> ExampleTable:
    """The rows of a split, with all that they need to be seen."""
    return vision.check(open_table(source, Path(data.tables), on_bad_data=data.on_bad_data))


def open_texts(source: SourceConfig, data: VLDataConfig) -> ExampleTable:
    """The rows of a split whose pictures nobody looks at."""
    unseen = source.model_copy(update={"images": None})
    return open_table(unseen, Path(data.tables), on_bad_data=data.on_bad_data)


def open_training(data: VLDataConfig, batch_size: int, vision: ImageCheck) -> dict[str, TrainingSet]:
    """Task name -> the rows of its training split that have an answer.

    Raises:
        ValueError: a split has none; and what `open_table` raises.
    """
    found = {}
    for task in data.tasks:
        assert task.train is not None
        table = open_source(task.train, data, vision).answered()
        if not len(table):
            raise ValueError(f"{task.train.file} has no answers to learn: it is a test split")
        found[task.task] = TrainingSet(table, task.train.images, task.batch_size or batch_size, task.weight)
    return found


def open_validation(
    data: VLDataConfig, decode: DecodeConfig, vision: ImageCheck, *, answered: bool = False
) -> dict[str, ValidationSet]:
    """The `valid` split of every task that has one, with the answers of its `train` where candidates are wanted.

    answered: every split must have answers to compare with.
    """
    found = {}
    for task in data.tasks:
        if task.valid is not None:
            candidates: tuple[str, ...] = ()
            if decode.takes_candidates(task.task) and task.train is not None:
                candidates = frequent_answers(open_texts(task.train, data), decode.min_answer_count)
                if not candidates:
                    raise ValueError(
                        f"min_answer_count: no answer occurs {decode.min_answer_count} times in {task.train.file}"
                    )
            table = open_source(task.valid, data, vision)
            if answered and not len(table.answered()):
                raise ValueError(f"{task.valid.file} has no answers to compare with: it is a test split")
            found[task.task] = ValidationSet(table, task.valid.images, candidates)
    return found


def frequent_answers(examples: Iterable[Example], min_count: int) -> tuple[str, ...]:
    """The distinct answers of these examples that occur in as many of them."""
    counts = Counter(answer for example in examples for answer in example.answers)
    return tuple(answer for answer, count in counts.items() if count >= min_count)

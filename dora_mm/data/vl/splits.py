"""The training and validation splits of a config's tasks: tables, image folders and candidate answers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import HeldOutConfig, SourceConfig, Split, VLDataConfig, VLTaskConfig
from dora_mm.data.vl.example import LEADING, Example
from dora_mm.data.vl.held_out import split_held_out
from dora_mm.data.vl.joining import joined
from dora_mm.data.vl.readers import read_source, resolved
from dora_mm.data.vl.readers.unread import about_unread
from dora_mm.data.vl.report import cheap_lengths
from dora_mm.data.vl.rows import BadRows, quiet
from dora_mm.data.vl.tables import ExampleTable, open_table
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.folders import Links

log = logging.getLogger(__name__)
ValueT = TypeVar("ValueT")
PEEKED = 100  # conversations that say which opening is usual


class RowCheck(Protocol):
    """An object that knows which rows can be read, such as a model."""

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        """A table of the rows that can be read.

        Raises:
            ValueError: A row cannot be read and the table's `on_bad_data` is "stop", or none can.
        """
        ...


class AllRows:
    """A check that accepts every row, for data that are read without a model."""

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        return table


@dataclass(frozen=True)
class TrainingSet:
    """The training split of one task.

    Attributes:
        table: The rows, all with an answer; of video captions one for each description of a clip.
        images: The folder of their images, None where only features are read.
        batch_size: Rows per batch.
        weight: Factor on the number of batches per epoch, see `TaskBatches`.
        source_weights: How often the rows of each of several sources of the table are drawn, see `Mixture`.
        lengths: The length of each row, where batches are of rows of about the same length; None: they are not.
    """

    table: ExampleTable
    images: str | None
    batch_size: int
    weight: float = 1.0
    source_weights: tuple[float, ...] = ()
    lengths: np.ndarray | None = None


@dataclass(frozen=True)
class ValidationSet:
    """The validation split of one task.

    Attributes:
        table: The rows.
        images: The folder of their images, None where only features are read.
        candidates: The answers that `decode.answers: trie` and `rank` choose from; empty in the other modes.
    """

    table: ExampleTable
    images: str | None
    candidates: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Changes with the rows, and with the answers to choose from."""
        if not self.candidates:
            return self.table.identity
        chosen = hashlib.blake2b(json.dumps(self.candidates).encode(), digest_size=8).hexdigest()
        return f"{self.table.identity} {chosen}"


def open_split(task: VLTaskConfig, split: Split, data: VLDataConfig, model: RowCheck) -> ExampleTable:
    """The rows of a split that the model can read.

    Args:
        task: A task that has this split.
        split: Which split.
        data: The `data` section of a config.
        model: Checks the rows.

    Raises:
        ValueError: No rows can be held out; also as in `open_table` and `RowCheck.check_rows`.
    """
    source = task.source_of(split)
    assert source is not None
    if not isinstance(task.valid, HeldOutConfig):
        table = _trained(task, data) if split == "train" else open_source(source, data)
        return model.check_rows(table)
    halves = _halves(task, data)
    if split == "valid":
        rows, num_held_out = sum(map(len, halves.values())), len(halves["valid"])
        log.info("%s: %s of %s rows are held out for validation", source.title, f"{num_held_out:,}", f"{rows:,}")
        if remark := about_share(task.valid, rows, num_held_out):
            log.warning("%s: %s", source.title, remark)
    return model.check_rows(halves[split])


def about_share(valid: HeldOutConfig, rows: int, num_held_out: int) -> str:
    """A sentence where the number of held-out rows is less than half or more than twice that of the share; else ""."""
    wanted = min(max(1, round(valid.share * rows)), valid.limit or rows)
    if wanted <= 2 * num_held_out and num_held_out <= 2 * wanted:
        return ""
    return (
        f"{num_held_out:,} of {rows:,} rows are held out, not {wanted:,} as data.valid.share {valid.share:g} asks for: "
        f"rows about one image stay together. Set a {'higher' if num_held_out < wanted else 'lower'} share, or give "
        "validation rows of their own in data.valid"
    )


def _halves(task: VLTaskConfig, data: VLDataConfig) -> dict[Split, ExampleTable]:
    """The rows of the training split that are trained on, and those that are held out, before any model checks them."""
    assert task.train is not None
    assert isinstance(task.valid, HeldOutConfig)
    trained, held_out = split_held_out(_trained(task, data), task.valid, images_of(task))
    return {"train": trained, "valid": held_out}


def open_source(source: SourceConfig, data: VLDataConfig, *, check_images: bool = True) -> ExampleTable:
    """The rows of a source, read as `data` says.

    Raises:
        ValueError: As in `open_table`.
    """
    return open_table(
        source,
        Path(data.tables),
        on_bad_data=data.on_bad_data,
        check_images=check_images,
        links=Links(data.follow_links, "set data.follow_links=true"),
        absolute_paths=data.absolute_paths,
    )


def _trained(task: VLTaskConfig, data: VLDataConfig) -> ExampleTable:
    """All rows of the training split, of one source or several."""
    assert task.train is not None
    if not task.more:
        return open_source(task.train, data)
    return joined([(open_source(source, data), source.images) for source in task.trained])


def images_of(task: VLTaskConfig) -> str | None:
    """The folder of the images of the training split; None: its rows have absolute paths, or only features are read."""
    return None if task.train is None or task.more else task.train.images


def training_texts(task: VLTaskConfig, data: VLDataConfig) -> ExampleTable:
    """The rows of a training split of which only the texts are used.

    Their images need not exist, unless they decide which rows are held out.

    Raises:
        ValueError: As in `open_split`.
    """
    assert task.train is not None
    if isinstance(task.valid, HeldOutConfig):
        return _halves(task, data)["train"]
    return joined([(open_texts(source, data), None) for source in task.trained])


def open_texts(source: SourceConfig, data: VLDataConfig) -> ExampleTable:
    """The rows of a split of which only the texts are used; their images need not exist.

    Raises:
        ValueError: As in `open_table`.
    """
    return open_source(source, data, check_images=False)


def open_training(data: VLDataConfig, batch_size: int, model: RowCheck) -> dict[str, TrainingSet]:
    """The training split of every task, restricted to rows with an answer.

    In the video tasks each description of a clip is a row, so that a clip with two is learned twice in an epoch.

    Args:
        data: The `data` section of a config.
        batch_size: Rows per batch for tasks that do not set their own.
        model: Checks the rows.

    Returns:
        The training sets by task name, in the order of the config.

    Raises:
        ValueError: A split has no answers; also as in `open_split`.
    """
    found = {}
    for task in data.all_tasks:
        assert task.train is not None
        table = open_split(task, "train", data, model)
        answered = table.answered()
        if empty := table.empty_answers():
            log.info("%s: %d answers are empty and not learned", task.train.title, empty)
        if not len(answered):
            raise ValueError(f"{task.train.title} has no answers to learn{why_unanswered(table)}")
        if table.unread:
            log.warning("%s: these columns are not read: %s", task.train.title, about_unread(table.unread))
        if len(answered) < len(table):
            unanswered = len(table) - len(answered)
            log.info("%s: %d of %d rows have no answer to learn", task.train.title, unanswered, len(table))
        answered = answered.per_answer() if TASKS[task.task].clips else _with_learned_answers(answered, task)
        found[task.task] = TrainingSet(
            answered,
            images_of(task),
            task.batch_size or batch_size,
            task.weight,
            tuple(source.weight for source in task.trained) if task.more else (),
            cheap_lengths(answered) if data.group_by_length else None,
        )
    return found


def _with_learned_answers(table: ExampleTable, task: VLTaskConfig) -> ExampleTable:
    """The rows of the training split, of which those of some sources have only their first answer.

    By default, those have all that have the answers of ten people, which one draws.
    """
    chosen = np.zeros(len(table), bool)
    of_people = table.lengths("raw_answers") > 0
    parts = table.by_source() if task.more else [np.arange(len(table))]
    for source, rows in zip(task.trained, parts, strict=True):
        if source.learned == "first":
            chosen[rows] = True if source.answers else ~of_people[rows]
    return table.first_answers(chosen)


def open_validation(
    data: VLDataConfig, decode: DecodeConfig, model: RowCheck, *, answered: bool = False
) -> dict[str, ValidationSet]:
    """The `valid` split of every task that has one, with candidate answers from its `train` split where needed.

    Args:
        data: The `data` section of a config.
        decode: The `decode` section, which says whether a task chooses from candidates.
        model: Checks the rows.
        answered: Whether every split must have reference answers.

    Returns:
        The validation sets by task name, in the order of the config.

    Raises:
        ValueError: No training answer is frequent enough to be a candidate, or a split has no answers although
            `answered` is set; also as in `open_split`.
    """
    found = {}
    for task in data.all_tasks:
        if (source := task.source_of("valid")) is not None:
            candidates: tuple[str, ...] = ()
            if decode.takes_candidates(task.task) and task.train is not None:
                candidates = frequent_answers(training_texts(task, data), decode.min_answer_count)
                if not candidates:
                    raise ValueError(
                        f"min_answer_count: no answer occurs {decode.min_answer_count} times in {task.train.title}"
                    )
            table = open_split(task, "valid", data, model)
            if answered and not len(table.answered()):
                raise ValueError(f"{source.title} has no answers to compare with{why_unanswered(table)}")
            images = images_of(task) if isinstance(task.valid, HeldOutConfig) else source.images
            found[task.task] = ValidationSet(table, images, candidates)
    return found


def why_unanswered(table: ExampleTable) -> str:
    """Why no row of a table has an answer: it is in a column that is not read, or rows are those of a test split."""
    return f"; these columns are not read: {about_unread(table.unread)}" if table.unread else ": it is a test split"


def check_data(data: VLDataConfig, decode: DecodeConfig, batch_size: int) -> None:
    """Reads the data of a training as far as that needs no model, since loading one takes minutes.

    Args:
        data: The `data` section of a config.
        decode: The `decode` section.
        batch_size: Rows per batch for tasks that do not set their own.

    Raises:
        ValueError: As in `open_training` and `open_validation`.
    """
    with quiet():  # warnings come when the rows are read for the model
        open_training(data, batch_size, AllRows())
        open_validation(data, decode, AllRows(), answered=True)


def usual_opening(task: VLTaskConfig) -> tuple[str | None, str]:
    """How most of the first conversations that a task is trained on begin.

    Returns:
        Their system turn, None if most have none; and the line break that is behind each image in front of the
        questions of most that have some, "" if there is none.

    Raises:
        ValueError: Their file is missing or cannot be read.
    """
    assert task.train is not None
    source = resolved(task.train.model_copy(update={"images": None}))
    systems: Counter[str | None] = Counter()
    breaks: Counter[str] = Counter()
    for example in islice(read_source(source, BadRows("skip")), PEEKED):
        first = example.turns[0]
        systems[first.text if first.role == "system" else None] += 1
        first_prompt = next(turn.text for turn in example.turns if turn.role == "user")
        if leading := LEADING.match(first_prompt):
            breaks["\n" if leading[0].endswith("\n") else ""] += 1
    return _usual(systems, None), _usual(breaks, "")


def _usual(found: Counter[ValueT], default: ValueT) -> ValueT:
    """The value that more than half of all are."""
    value, number = found.most_common(1)[0] if found else (default, 0)
    return value if 2 * number > found.total() else default


def frequent_answers(examples: Iterable[Example], min_count: int) -> tuple[str, ...]:
    """The distinct answers that occur in at least `min_count` of the examples, in order of first occurrence."""
    counts = Counter(answer for example in examples for answer in example.answers)
    return tuple(answer for answer, count in counts.items() if count >= min_count)

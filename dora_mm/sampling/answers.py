"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dora_mm.core import fixed_parameters
from dora_mm.data.vl.answers import Answer, AnsweredRows, ModelAnswer, texts_of
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.rows import OnBadData, RowTooLongError
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.registries.suites import file_stem
from dora_mm.utils.atomic import append_text, write_text
from dora_mm.utils.circumstances import NOTHING, Record, about_kept, circumstances
from dora_mm.utils.day import Day
from dora_mm.utils.evaluating import Map, evaluating
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.processes import SINGLE_PROCESS, Processes
from dora_mm.utils.progress import Progress, tracked

log = logging.getLogger(__name__)
FEW = 8  # rows of each split
REPEATED = 100  # rows of each split at most that are answered a second time, each alone
Twice = Sequence[tuple[Example, str, str]]  # rows with the answer of each in its batch, and alone
ContentOf = Callable[[Example, str | None], str]  # an example and the folder of its images -> what they are
MOST_REFERENCES = 5  # of a caption, or answers of VQA


@dataclass(frozen=True)
class AnswersFolder:
    """The folder of an evaluation's answers, from which an interrupted evaluation resumes.

    Attributes:
        path: The folder, which gets <task>.jsonl.
        content: Gives the content digest of an example's images, which is compared before saved answers are reused.
        processes: The processes that share the batches; only the main one writes.
        day: The day that chat templates may use; it is compared where they used it.
        circumstances: The circumstances of answers that are added.
    """

    path: Path
    content: ContentOf
    processes: Processes = SINGLE_PROCESS
    day: Day = field(default_factory=Day)
    circumstances: Record = field(default_factory=circumstances)


class KeptAnswer(NamedTuple):
    """The answer to a row in a file.

    Attributes:
        answer: The answer; None: the row could not be read.
        content: The content of its images, see `AnswersFolder`.
        circumstances: The circumstances under which it was given.
        day: The day of its batch where a chat template used it.
    """

    answer: ModelAnswer | None
    content: str
    circumstances: Record = NOTHING
    day: str | None = None


def answer_all(
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
    limit: int | None = None,
    mapped: Map = map,
    folder: AnswersFolder | None = None,
) -> dict[str, AnsweredRows]:
    """Answers the rows of every split.

    All networks run in eval mode, and adapted weights are computed once for all rows.

    Args:
        answers: The function that answers the examples of a task, by task name.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
        limit: Answers only this many rows of each split; None means all.
        mapped: Computes the answers to batches, in any order; other than `map` where several processes share them, or
            threads.
        folder: Keeps the answers; None: nothing does.

    Returns:
        The examples with their answers, by task name, in the order of the splits.

    Raises:
        ValueError: A row cannot be read, and the table's `on_bad_data` is "stop"; or none of a split can.
    """
    with evaluating(networks) as together, fixed_parameters(together):
        found = {}
        for name, split in sets.items():
            kept = folder and KeptAnswers(folder, name, split)
            found[name] = _answer_split(answers[name], split, batch_size, limit, name, mapped, kept)
        return found


def answer_unbatched(
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    answered: Mapping[str, AnsweredRows],
    mapped: Map = map,
) -> dict[str, Twice]:
    """Answers rows of every split again, each alone, evenly spaced over those that were answered.

    Args:
        answers: As in `answer_all`.
        networks: As there.
        sets: As there.
        answered: What it returned.
        mapped: As there.
    """
    found = {}
    with evaluating(networks) as together, fixed_parameters(together):
        for name, rows in answered.items():
            chosen = [rows[number * len(rows) // REPEATED] for number in range(REPEATED)]
            chosen = chosen if len(rows) > REPEATED else rows

            def unbatched_text(row: tuple[Example, ModelAnswer], name: str = name) -> str:
                return texts_of(answers[name]([row[0]], sets[name].images))[0]

            unbatched = mapped(unbatched_text, chosen)
            shown = tracked(zip(chosen, unbatched, strict=True), f"{name}, each row alone", "rows", len(chosen))
            found[name] = [(example, answer.text, again) for (example, answer), again in shown]
    return found


def num_answered(sets: Mapping[str, ValidationSet], limit: int | None) -> int:
    """How many rows `answer_all` answers if all of them can be read."""
    return sum(len(split.table) if limit is None else min(limit, len(split.table)) for split in sets.values())


def _answer_split(
    answer: Answer,
    split: ValidationSet,
    batch_size: int,
    limit: int | None,
    name: str,
    mapped: Map,
    kept: KeptAnswers | None,
) -> AnsweredRows:
    """Answers the rows of a split in batches.

    A row that cannot be read, since its image is damaged, say, is named and left out where the table's `on_bad_data`
    is "skip", as in a training; one that is too long for the model in either mode.
    """
    table = split.table
    count = len(table) if limit is None else min(limit, len(table))
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    answered = kept.full_batches(batches) if kept else {}
    batches = [rows for rows in batches if rows[0] not in answered]
    errors: list[ValueError] = []
    with Progress(name, count, "rows", done=len(answered)) as progress:

        def answers_of(rows: range) -> tuple[list[int], list[dict | None], list[str], str | None]:
            num_requests = kept.folder.day.num_requests if kept else 0
            examples = [table[row] for row in rows]
            try:
                found: list[ModelAnswer | None] = [*map(ModelAnswer.of, answer(examples, split.images))]
            except ValueError as error:
                if table.on_bad_data == "stop" and not isinstance(error, RowTooLongError):
                    raise
                if len(examples) == 1:
                    found = [_left_out(error, errors)]
                else:
                    found = _one_by_one(answer, examples, split.images, errors, table.on_bad_data)
            progress.advance(len(rows))
            day = kept.folder.day.date if kept and kept.folder.day.num_requests > num_requests else None
            contents = [kept.content(row) for row in rows] if kept else []
            return list(rows), [each and each.fields() for each in found], contents, day  # what JSON can hold

        for rows, fields, contents, day in mapped(answers_of, batches):
            found = {row: each and ModelAnswer(**each) for row, each in zip(rows, fields, strict=True)}
            if kept:
                kept.add(found, contents, day)
            answered |= found
            progress.done = max(progress.done, len(answered))  # others have answered, too
    read = [(table[row], each) for row in range(count) if (each := answered[row]) is not None]
    if count and not read:
        raise errors[0] if errors else ValueError(f"no row of {name} could be read")
    if len(read) < count:
        log.warning("%d of %d rows of %s could not be read, and were left out", count - len(read), count, name)
    return read


def _one_by_one(
    answer: Answer, examples: Sequence[Example], images: str | None, errors: list[ValueError], on_bad_data: OnBadData
) -> list[ModelAnswer | None]:
    """The answers to the examples, None to those that are left out; what is wrong with them is logged and kept."""
    found: list[ModelAnswer | None] = []
    for example in examples:
        try:
            found += map(ModelAnswer.of, answer([example], images))
        except ValueError as error:
            if on_bad_data == "stop" and not isinstance(error, RowTooLongError):
                raise
            found.append(_left_out(error, errors))
    return found


def _left_out(error: ValueError, errors: list[ValueError]) -> None:
    """The answer to a row that is left out: none."""
    log.warning("%s; left out of the answers", error)
    errors.append(error)


def save_answers(
    file: Path | None,
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
) -> None:
    """Answers the first rows of every split, and writes them to a file: a JSON object with the question on each line.

    Args:
        file: The file; None: only answers them, as a process that others need for that.
        answers: As in `answer_all`, like all that follow.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
    """
    lines = []
    for name, rows in answer_all(answers, networks, sets, batch_size, limit=FEW).items():
        for row, answer in rows:
            about: dict[str, object] = {"task": name, "id": row.id, "question": row.text, "answer": answer.text}
            about["references"] = row.answers[:MOST_REFERENCES]
            lines.append(json.dumps(about, ensure_ascii=False))
    if file is not None:
        write_text(file, "".join(f"{line}\n" for line in lines))
        log.info("answers  %s", file if lines else "none: no task has a valid split")


class KeptAnswers:
    """The answers to the rows of a split in a file, from which an interrupted evaluation resumes.

    Each line is of a row: its number in the split, its answer, None where it could not be read, the digest of its
    images, the day where the chat template of its batch used it, and a checksum. They are in the order in which answers
    came. A line of another kind, an object, has the circumstances of the rows that follow.

    Args:
        folder: Where it is.
        task: The task.
        split: The split.
    """

    def __init__(self, folder: AnswersFolder, task: str, split: ValidationSet):
        self.file, self.folder, self.split, self.task = _file_of(folder.path, task), folder, split, task
        self._last = NOTHING  # the circumstances of the last row of the file

    def full_batches(self, batches: Sequence[range]) -> dict[int, ModelAnswer | None]:
        """The answers, by row, of whole batches that an earlier process has kept; others are taken out of the file.

        A batch is asked again where the images of a row are others now, or its day is.
        """
        processes = self.folder.processes
        found = self._full_batches(batches) if processes.is_main else []
        found = processes.from_main([[row, kept and kept.fields()] for row, kept in found])
        return {row: fields and ModelAnswer(**fields) for row, fields in found}

    def _full_batches(self, batches: Sequence[range]) -> list[tuple[int, ModelAnswer | None]]:
        ours, last = self.folder.day, batches[-1].stop if batches else 0
        fitting = {
            row: kept
            for row, kept in _kept(self.file).items()
            if row < last and kept.day in (None, ours.date) and kept.content == self.content(row)
        }
        found = {row: fitting[row] for rows in batches if all(row in fitting for row in rows) for row in rows}
        write_text(self.file, _text(found.items(), NOTHING))
        kept = list(found.values())
        self._last = kept[-1].circumstances if kept else NOTHING
        ours.num_requests += sum(row.day is not None for row in kept)
        if message := about_kept(by_circumstances(kept), self.folder.circumstances, f"kept answers of {self.task}"):
            log.warning(message)
        return [(row, each.answer) for row, each in found.items()]

    def add(self, answers: Mapping[int, ModelAnswer | None], contents: Iterable[str], day: str | None) -> None:
        """Keeps the answers to rows, what the images of each were, and their day.

        An answer that did not arrive is not kept: the next start asks for it again.
        """
        self.folder.day.num_requests += day is not None  # another process may have rendered them
        if self.folder.processes.is_main:
            now = self.folder.circumstances
            rows = [
                (row, KeptAnswer(answer, content, now, day))
                for (row, answer), content in zip(answers.items(), contents, strict=True)
                if answer is None or not answer.failure
            ]
            append_text(self.file, _text(rows, self._last))
            self._last = now if rows else self._last

    def content(self, row: int) -> str:
        """The content digest of the images of a row."""
        try:
            return self.folder.content(self.split.table[row], self.split.images)
        except (OSError, ValueError):  # what cannot be read has no answer either
            return ""


def read_answers(folder: Path, task: str) -> list[KeptAnswer]:
    """The answers to the rows of a task that `answer_all` has kept in a folder, in the order of the rows."""
    return [kept for _, kept in sorted(_kept(_file_of(folder, task)).items())]


def mixed_circumstances(folder: Path, task: str) -> str:
    """A sentence on answers in a folder that were given under other circumstances than the last; empty: none were."""
    rows = read_answers(folder, task)
    return about_kept(by_circumstances(rows), rows[-1].circumstances, "answers") if rows else ""


def by_circumstances(rows: Iterable[KeptAnswer]) -> list[tuple[Record, int]]:
    """The circumstances of rows, each with the number of consecutive rows that have them."""
    return [(now, len(list(same))) for now, same in groupby(row.circumstances for row in rows)]


def _file_of(folder: Path, task: str) -> Path:
    return folder / f"{file_stem(task)}.jsonl"


def _kept(file: Path) -> dict[int, KeptAnswer]:
    """The rows of a file of answers, up to one that a killed process did not finish, or a damaged line."""
    rows: dict[int, KeptAnswer] = {}
    now: Record = NOTHING
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            found = parse_json(line, file.name, object)
            if isinstance(found, dict):
                now = dict(found["circumstances"])
                continue
            *row, checksum = found
            number, fields, content, day = row
            kept = KeptAnswer(fields and ModelAnswer(**fields), content, now, day)
        except (ValueError, TypeError, KeyError):
            break
        if checksum != _checksum(row):
            break
        rows[number] = kept
    return rows


def _text(rows: Iterable[tuple[int, KeptAnswer]], before: Record) -> str:
    """The lines of rows, by number, that follow a row with the circumstances `before`."""
    lines = []
    for number, (answer, content, now, day) in rows:
        lines += [] if now == before else [json.dumps({"circumstances": dict(now)})]
        row = [number, answer and answer.fields(), content, day]
        lines.append(json.dumps([*row, _checksum(row)]))
        before = now
    return "".join(f"{line}\n" for line in lines)


def _checksum(row: Sequence[object]) -> int:
    return zlib.crc32(json.dumps(row).encode())

"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Answer, Predictions
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.utils.atomic import append_text, write_text

log = logging.getLogger(__name__)
FEW = 8  # rows of each split
MOST_REFERENCES = 5  # of a caption, or answers of VQA


def answer_all(
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, Predictions]:
    """Answers the rows of every split.

    All networks run in eval mode, and adapted weights are computed once for all rows.

    Args:
        answers: The function that answers the examples of a task, by task name.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
        limit: Answers only this many rows of each split; None means all.
        folder: Keeps the answers, in <task>.jsonl, from which a process goes on after one that was stopped; None keeps
            none.

    Returns:
        The examples with their answers, by task name, in the order of the splits.

    Raises:
        ValueError: A row cannot be read.
    """
    together = nn.ModuleList(networks)
    before = {module: module.training for module in together.modules()}  # parts of a network may differ
    try:
        together.eval()
        with fixed_parameters(together):
            return {
                name: predict(answers[name], split, batch_size, limit, name, folder and folder / f"{name}.jsonl")
                for name, split in sets.items()
            }
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def predict(
    answer: Answer, split: ValidationSet, batch_size: int, limit: int | None, name: str, file: Path | None = None
) -> Predictions:
    """Answers the rows of a split in batches; returns each example with its answer.

    Args:
        answer: Answers the examples of a batch. Its model should be in eval mode, and its parameters fixed.
        split: The examples, with the folder of their images.
        batch_size: Examples per batch.
        limit: Answers only this many rows; None means all.
        name: The name of the task, for the progress bar.
        file: Keeps the answers, see `answer_all`.
    """
    table = split.table
    count = len(table) if limit is None else min(limit, len(table))
    kept = kept_answers(file, batch_size, count) if file else []
    rows = [(table[index], text) for index, text in enumerate(kept)]
    with tqdm(total=count, initial=len(rows), desc=name, unit="row", delay=2, disable=None) as bar:
        for start in range(len(rows), count, batch_size):
            examples = [table[index] for index in range(start, min(start + batch_size, count))]
            texts = answer(examples, split.images)
            rows += zip(examples, texts, strict=True)
            if file:
                append_text(file, "".join(map(_line, texts)))
            bar.update(len(examples))
    return rows


def save_answers(
    file: Path,
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
) -> None:
    """Answers the first rows of every split, and writes them to a file: a JSON object with the question on each line.

    Args:
        file: The file.
        answers: As in `answer_all`, like all that follow.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
    """
    lines = []
    for name, rows in answer_all(answers, networks, sets, batch_size, limit=FEW).items():
        for row, text in rows:
            about: dict[str, object] = {"task": name, "id": row.id, "question": row.text, "answer": text}
            about["references"] = row.answers[:MOST_REFERENCES]
            lines.append(json.dumps(about, ensure_ascii=False))
    write_text(file, "".join(f"{line}\n" for line in lines))
    log.info("answers  %s", file if lines else "none: no task has a valid split")


def kept_answers(file: Path, batch_size: int, count: int) -> list[str]:
    """The answers of whole batches that an earlier process has kept; what follows them is cut off the file."""
    found: list[str] = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            text, checksum = json.loads(line)
        except (ValueError, TypeError):  # a line that a killed process did not finish, or a damaged one
            break
        if checksum != _checksum(text):
            break
        found.append(text)
    whole = found if len(found) == count else found[: len(found) // batch_size * batch_size]
    write_text(file, "".join(map(_line, whole)))
    return whole


def _line(answer: str) -> str:
    return json.dumps([answer, _checksum(answer)]) + "\n"


def _checksum(answer: str) -> int:
    return zlib.crc32(answer.encode())

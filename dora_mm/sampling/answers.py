"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from tqdm import tqdm

from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Answer, Predictions
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.utils.modes import evaluating
from dora_mm.utils.sharing import map_shared


def answer_all(
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
    limit: int | None = None,
    process: tuple[int, int] = (0, 1),
) -> dict[str, Predictions]:
    """Answers the rows of every split.

    All networks run in eval mode, and adapted weights are computed once for all rows.

    Args:
        answers: The function that answers the examples of a task, by task name.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
        limit: Answers only this many rows of each split; None means all.
        process: (index, count) if several processes share the batches.

    Returns:
        The examples with their answers, by task name, in the order of the splits.

    Raises:
        ValueError: A row cannot be read.
    """
    with evaluating(networks) as together, fixed_parameters(together):
        return {
            name: _answer_split(answers[name], split, batch_size, limit, name, process) for name, split in sets.items()
        }


def _answer_split(
    answer: Answer, split: ValidationSet, batch_size: int, limit: int | None, name: str, process: tuple[int, int]
) -> Predictions:
    table = split.table
    count = len(table) if limit is None else min(limit, len(table))
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    with tqdm(total=count, desc=name, unit="row", delay=2, disable=None) as bar:

        def answers_of(rows: range) -> list[str]:
            bar.update(len(rows))
            return list(answer([table[row] for row in rows], split.images))

        texts = [text for found in map_shared(answers_of, batches, process) for text in found]
    return [(table[row], text) for row, text in zip(range(count), texts, strict=True)]

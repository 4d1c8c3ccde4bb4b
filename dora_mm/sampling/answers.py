"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm

from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Answer, Example, Predictions
from dora_mm.data.vl.splits import ValidationSet

log = logging.getLogger(__name__)


def answer_all(
    answers: Mapping[str, Answer],
    networks: Iterable[nn.Module],
    sets: Mapping[str, ValidationSet],
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Predictions]:
    """Answers the rows of every split.

    All networks run in eval mode, and adapted weights are computed once for all rows.

    Args:
        answers: The function that answers the examples of a task, by task name.
        networks: The networks that compute the answers.
        sets: The splits by task name.
        batch_size: Examples per batch.
        limit: Answers only this many rows of each split; None means all.

    Returns:
        The examples with their answers, by task name, in the order of the splits.

    Raises:
        ValueError: A row cannot be read, and the table's `on_bad_data` is "stop"; or none can.
    """
    together = nn.ModuleList(networks)
    before = {module: module.training for module in together.modules()}  # parts of a network may differ
    try:
        together.eval()
        with fixed_parameters(together):
            return {name: predict(answers[name], split, batch_size, limit, name) for name, split in sets.items()}
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def predict(answer: Answer, split: ValidationSet, batch_size: int, limit: int | None, name: str) -> Predictions:
    """Answers the rows of a split in batches; returns each example with its answer.

    A row that cannot be read, since its picture is damaged, say, is named and left out where the table's `on_bad_data`
    is "skip", as in a training.

    Args:
        answer: Answers the examples of a batch. Its model should be in eval mode, and its parameters fixed.
        split: The examples, with the folder of their images.
        batch_size: Examples per batch.
        limit: Answers only this many rows; None means all.
        name: The name of the task, for the progress bar.

    Raises:
        ValueError: As `answer_all`.
    """
    table = split.table
    count = len(table) if limit is None else min(limit, len(table))
    rows: Predictions = []
    left_out: list[ValueError] = []
    with tqdm(total=count, desc=name, unit="row", delay=2, disable=None) as bar:
        for start in range(0, count, batch_size):
            examples = [table[index] for index in range(start, min(start + batch_size, count))]
            try:
                rows += zip(examples, answer(examples, split.images), strict=True)
            except ValueError:
                if table.on_bad_data == "stop":
                    raise
                rows += _one_by_one(answer, examples, split.images, left_out)
            bar.update(len(examples))
    if left_out and not rows:
        raise left_out[0]
    if left_out:
        log.warning("%d of %d rows of %s could not be read, and were left out", len(left_out), count, name)
    return rows


def _one_by_one(
    answer: Answer, examples: Sequence[Example], images: str | None, left_out: list[ValueError]
) -> Predictions:
    """The examples that can be read, with their answers; what is wrong with the others is logged and collected."""
    rows: Predictions = []
    for example in examples:
        try:
            rows += zip([example], answer([example], images), strict=True)
        except ValueError as error:
            log.warning("%s; left out of the answers", error)
            left_out.append(error)
    return rows

"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from tqdm import tqdm

from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Answer, Predictions
from dora_mm.data.vl.splits import ValidationSet


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
        ValueError: A row cannot be read.
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

    Args:
        answer: Answers the examples of a batch. Its model should be in eval mode, and its parameters fixed.
        split: The examples, with the folder of their images.
        batch_size: Examples per batch.
        limit: Answers only this many rows; None means all.
        name: The name of the task, for the progress bar.
    """
    table = split.table
    count = len(table) if limit is None else min(limit, len(table))
    rows = []
    with tqdm(total=count, desc=name, unit="row", delay=2, disable=None) as bar:
        for start in range(0, count, batch_size):
            examples = [table[index] for index in range(start, min(start + batch_size, count))]
            rows += zip(examples, answer(examples, split.images), strict=True)
            bar.update(len(examples))
    return rows

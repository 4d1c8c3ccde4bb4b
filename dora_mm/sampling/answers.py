"""Answers to the examples of validation and test splits, by any vision-language model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm import tqdm

from dora_mm.config.vl import DecodeConfig
from dora_mm.core import fixed_parameters
from dora_mm.data.vl.example import Predictions
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.tasks.vl import Answer, VLModel


def answerers(model: VLModel, sets: Mapping[str, ValidationSet], config: DecodeConfig) -> dict[str, Answer]:
    """The functions that answer the examples of each split.

    Args:
        model: The model with its preprocessing.
        sets: The splits by task name.
        config: The decoding settings.

    Raises:
        ValueError: The model cannot do a task, or a task needs candidates and its split has none.
    """
    model.check(sets)
    return {name: model.answerer(name, config, split.candidates) for name, split in sets.items()}


def answer_all(
    model: VLModel, sets: Mapping[str, ValidationSet], config: DecodeConfig, limit: int | None = None
) -> dict[str, Predictions]:
    """Answers the rows of every split.

    All networks run in eval mode, and adapted weights are computed once for all rows.

    Args:
        model: The model with its preprocessing.
        sets: The splits by task name.
        config: The decoding settings.
        limit: Answers only this many rows of each split; None means all.

    Returns:
        The examples with their answers, by task name, in the order of the splits.

    Raises:
        ValueError: As `answerers`; or a row cannot be read.
    """
    by_task = answerers(model, sets, config)
    networks = torch.nn.ModuleList(model.networks.values())
    before = [network.training for network in networks]
    try:
        networks.eval()
        with fixed_parameters(networks):
            return {name: predict(by_task[name], split, config.batch_size, limit, name) for name, split in sets.items()}
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)


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

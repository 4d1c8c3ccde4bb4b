"""The rows of an evaluation that a training has learned."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_mm.config.vl_data import VLDataConfig, VLTaskConfig
from dora_mm.data.vl.readers import data_files, resolved
from dora_mm.data.vl.splits import ValidationSet, training_texts
from dora_mm.data.vl.tables import ExampleTable

OF_A_LATER_FILE = re.compile(r" \(file \d+\)$")  # see `joined`


def rows_trained_on(training: VLDataConfig, data: VLDataConfig, splits: Mapping[str, ValidationSet]) -> dict[str, int]:
    """How many rows of each task a training has learned; tasks without such rows are left out.

    Which rows a training held out follows from its config and the files. Rows are compared where the evaluation reads a
    file of the training, by their ids and texts.

    Args:
        training: The `data` section of the training.
        data: That of the evaluation.
        splits: The rows that it scores, by task.

    Raises:
        ValueError: A file of the training is gone, or cannot be read.
    """
    learned = set().union(*_learned(training, data))
    counts = {name: len(learned.intersection(_named(split.table))) for name, split in splits.items() if learned}
    return {name: count for name, count in counts.items() if count}


def _learned(training: VLDataConfig, evaluated: VLDataConfig) -> Iterator[set[Any]]:
    """The rows of each task that was trained on a file of the evaluation."""
    files = {file for task in evaluated.all_tasks for file in _files(task)}
    for task in training.all_tasks:
        if files & set(_files(task, trained=True)):
            yield set(_named(training_texts(task, training)))


def _files(task: VLTaskConfig, *, trained: bool = False) -> Iterator[Path]:
    """The data files of the training split, or those that the rows of the validation split come from."""
    valid = task.source_of("valid")
    of_training = trained or valid is task.train
    for source in task.trained if of_training else [valid] if valid else []:
        yield from (file.absolute() for file in data_files(resolved(source), "file"))


def _named(table: ExampleTable) -> Iterator[tuple[str, str]]:
    """The rows by their ids in their own file, and what they say."""
    for row, content in zip(table, table.contents(), strict=True):
        yield OF_A_LATER_FILE.sub("", row.id), repr(content)

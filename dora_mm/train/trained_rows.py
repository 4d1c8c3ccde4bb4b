"""The rows of an evaluation that the adapter's own training has learned."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.vl import TrainVLConfig
from dora_mm.config.vl_data import VLDataConfig, VLTaskConfig
from dora_mm.data.vl.readers import data_files, resolved
from dora_mm.data.vl.splits import ValidationSet, training_texts
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.train.resuming import started_config
from dora_mm.utils.run_directory import CONFIG, INPUTS

log = logging.getLogger(__name__)
OF_A_LATER_FILE = re.compile(r" \(file \d+\)$")  # see `joined`


def rows_trained_on(folder: Path, data: VLDataConfig, splits: Mapping[str, ValidationSet]) -> dict[str, str]:
    """A sentence for each task of which some rows were trained on by the run of an adapter.

    The run keeps its config, and which rows were held out follows from it and from the files. Rows are compared where
    the evaluation reads a file of the training, by their ids and texts.

    Args:
        folder: The folder of the adapter; without a run of `train_vl` around it, nothing is known and nothing is said.
        data: The `data` section of the evaluation.
        splits: The rows that it scores, by task.
    """
    run = run_of(folder)
    if run is None:
        return {}
    try:
        training = started_config(run, SCHEMAS)
        if not isinstance(training, TrainVLConfig):
            return {}
        learned = list(_learned(training.data, data))
    except ValueError as error:  # files that are gone, or were changed
        log.warning("Whether %s was trained on these rows is not known: %s", run, error)
        return {}
    found = {}
    for name, split in splits.items():
        rows = set(_named(split.table))
        if count := len(rows.intersection(*[set().union(*learned)])):
            found[name] = (
                f"{count:,} of {len(split.table):,} rows were trained on by {run} ({CONFIG}): the score is none of "
                "held-out rows; take the data section of the training"
            )
    return found


def run_of(folder: Path) -> Path | None:
    """The run directory that an adapter's folder is in: as `adapter`, or one of those in `best` and `checkpoints`."""
    parents = list(folder.absolute().parents)[:2]
    return next((path for path in parents if (path / CONFIG).is_file() and (path / INPUTS).is_file()), None)


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

"""What to know about the rows of a training before it starts: how long they are, and which cannot be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from dora_mm.data.vl.lengths import RowLengths, evenly_spaced, length_line
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.models.vl import VLModel

SAMPLE = 2000  # rows of a task whose lengths are counted before a training


class Surveyed(NamedTuple):
    """The rows of a task.

    Attributes:
        lengths: Their lengths; None for a family that has none to tell.
        bad: Why rows of the table cannot be trained on, by index.
    """

    lengths: RowLengths | None
    bad: Mapping[int, str]


def survey(model: VLModel, task: str, rows: TrainingSet, sample: int | None = None) -> Surveyed:
    """Counts the tokens of a task's rows.

    Args:
        model: The model.
        task: Name of the task.
        rows: Its training set.
        sample: How many rows, evenly spaced, are counted; None: all. Rows that cannot be trained on are found among
            these, and where bad rows are skipped also among all others, as far as their images tell: a training that
            stops at a bad row stops there anyway, and one that goes on has to know it.
    """
    table = rows.table
    chosen = evenly_spaced(len(table), sample or len(table))
    found = model.lengths(task, table.select(chosen), rows.images)
    if found is None:
        return Surveyed(None, {})
    bad = {int(chosen[row]): reason for row, reason in found.bad_rows.items()}
    if len(chosen) < len(table) and table.on_bad_data == "skip":
        images = model.lengths(task, table, rows.images, texts=False)
        bad |= images.bad_rows if images else {}
    return Surveyed(found, bad)


def survey_all(
    model: VLModel, sets: Mapping[str, TrainingSet], sample: int = SAMPLE
) -> tuple[dict[str, TrainingSet], str]:
    """Looks at the rows of every task before a training.

    Args:
        model: The model.
        sets: The training sets by task name.
        sample: How many rows of each are counted, see `survey`.

    Returns:
        The training sets without the rows that cannot be trained on, and a line for each task.

    Raises:
        ValueError: A row cannot be trained on and its table's `on_bad_data` is "stop", or none can.
    """
    left, lines = {}, []
    for task, rows in sets.items():
        found = survey(model, task, rows, sample)
        left[task] = replace(rows, table=rows.table.without_rows(found.bad))
        lines.append(length_line(task, left[task].table, found.lengths))
    return left, "\n".join(lines)

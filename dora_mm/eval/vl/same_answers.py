"""How many answers of a model stay the same when it is served in another form, such as with a plain LoRA for a DoRA."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dora_mm.data.vl.example import Example
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.eval.vl.confidence_intervals import AnswerScores, confidence_intervals, groups_of


def share_of_same(task: str, rows: Sequence[tuple[Example, str, str]]) -> tuple[ConfidenceInterval, int]:
    """The share of answers that are equal, letter by letter, with its 95 % interval over images.

    Args:
        task: The task.
        rows: The rows, each with the answers of both forms.

    Returns:
        The share, and the number of rows; rows of the same id are one, as where they are scored.
    """
    same: dict[str, bool] = {}
    for example, answer, other in rows:
        same[example.id] = same.get(example.id, True) and answer == other
    scores = AnswerScores(np.array([list(same.values())], dtype=float).T, groups_of(task, [row for row, _, _ in rows]))
    return confidence_intervals({task: scores})[task], len(same)


def share_of_others(task: str, rows: Sequence[tuple[Example, str, str]]) -> tuple[ConfidenceInterval, int]:
    """The share of answers that differ, as in `share_of_same`."""
    same, count = share_of_same(task, rows)
    ends = {"low": 1 - same.high, "high": 1 - same.low} if same.has_ends else {}
    return replace(same, mean=1 - same.mean, **ends), count

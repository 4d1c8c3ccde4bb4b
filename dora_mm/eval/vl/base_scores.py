"""The scores of a model as its training starts, with which those of its adapter are compared."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dora_mm.data.vl.example import Predictions
from dora_mm.eval.statistics import LEAST_GROUPS
from dora_mm.eval.vl.confidence_intervals import (
    TOO_FEW,
    AnswerScores,
    answer_scores,
    confidence_intervals,
    number_of,
    points,
    precision_notes,
)
from dora_mm.eval.vl.scores import VLScores
from dora_mm.utils.atomic import write_text

FILE = "base_scores.json"  # in the run directory


def write_base(path: Path, answered: Mapping[str, Predictions]) -> None:
    """Writes the score of each answer of the base model, by task."""
    scores = {name: answer_scores(name, [rows]) for name, rows in answered.items()}
    values = {
        name: {"values": found.values_QS[:, 0].tolist(), "groups": found.groups}
        for name, found in scores.items()
        if found is not None
    }
    write_text(path, json.dumps(values) + "\n")


def read_base(path: Path) -> dict[str, AnswerScores]:
    """The scores that `write_base` has written; none where there is no file."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: AnswerScores(np.array([one["values"]], dtype=float).T, tuple(one["groups"]))
        for name, one in found.items()
    }


def with_gain(name: str, scores: VLScores, answered: Predictions, base: AnswerScores | None) -> VLScores:
    """Adds notes to the scores of a task: how precisely they are known, and what the adapter added to the base model.

    Args:
        name: The task.
        scores: Of the model with its adapter.
        answered: The answers that they are of.
        base: Of the base model; None: it was not scored.
    """
    notes = precision_notes(name, answered, scores.main)
    ours = answer_scores(name, [answered])
    if ours is not None and base is not None and ours.groups == base.groups:  # the same rows could be read
        notes.append(gain(name, scores.main, ours, base))
    return replace(scores, notes=(*scores.notes, *notes))


def gain(task: str, main: str, ours: AnswerScores, base: AnswerScores) -> str:
    """Returns a sentence with both scores and their paired difference.

    Args:
        task: The task.
        main: The name of the main metric.
        ours: The scores with the adapter.
        base: The scores without it, of the same answers.
    """
    before, after = (100 * found.values_QS.mean() for found in (base, ours))
    groups, number = len(set(ours.groups)), number_of(ours)
    less = confidence_intervals({task: ours.minus(base)}, differences=True)[task]
    about = "95 % interval" if groups >= LEAST_GROUPS else TOO_FEW
    scores = f"{main} of the base {before:.1f}, with the adapter {after:.1f}"
    return f"{scores}: {points(less, groups)} points; {about}; {number}"

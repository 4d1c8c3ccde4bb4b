"""The accuracy of pairs: in how many the chosen answer is preferred, by the margin that a model answers."""

import numpy as np

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.statistics import share_interval
from dora_mm.eval.vl.intervals import AnswerScores, group_cells, points, variance_of_independent
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, check_answered, percent


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the margin of a pair is above 0, else 0: a model that prefers neither is wrong, as in TRL."""
    return float(float(prediction) > 0)


def score_preferences(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, and the mean `margin` x 100. A note has the interval of the accuracy over images.

    Raises:
        ValueError: There are no predictions.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    metrics = {"accuracy": percent(values), "margin": percent([float(prediction) for _, prediction in predictions])}
    groups = tuple(" ".join(example.images) or f"row {example.id}" for example, _ in predictions)
    notes = ()
    if len(set(groups)) > 1:
        scores = AnswerScores(np.array(values)[:, None], groups)
        interval = share_interval(group_cells([scores]), least=variance_of_independent([scores]))
        notes = (f"accuracy {points(interval)}: its 95 % interval, over images",)
    return VLScores("accuracy", metrics, notes=notes)


SCORER = AnswerScorer(score_preferences, row_accuracy)

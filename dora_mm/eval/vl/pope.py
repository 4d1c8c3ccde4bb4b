"""POPE: whether a model sees objects that are not there, by yes and no, as evaluate.py of AoiDragon/POPE counts."""

from collections.abc import Sequence

import numpy as np

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.statistics import ConfidenceInterval, jackknife, share_ci
from dora_mm.eval.vl.confidence_intervals import AnswerScores, group_cells, variance_of_independent
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, percent

NO = frozenset({"No", "no", "not"})
YES = frozenset({"Yes", "yes"})
RULE = "POPE's evaluate.py: no where the first sentence has the word No, no or not, else yes"


def words_of(prediction: str) -> set[str]:
    """The words of the first sentence, between single spaces, without commas; a line break separates none."""
    return set(prediction.partition(".")[0].replace(",", "").split(" "))


def says_yes(prediction: str) -> bool:
    """Whether an answer counts as yes, as all do without one of three words."""
    return not words_of(prediction) & NO


def is_yes(example: Example) -> bool:
    """Whether the right answer is yes."""
    return example.answers[0].lower() != "no"  # as VLMEvalKit's files have it, too


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where yes or no is right, else 0."""
    return float(says_yes(prediction) == is_yes(example))


def shares(counts: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of yes, and the share of yes; 0 where nothing is counted.

    Args:
        counts: True and false yes, true and false no, (4,).
    """
    hits, alarms, rejected, missed = map(float, counts)
    precision = hits / (hits + alarms) if hits + alarms else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    both = precision + recall
    total = hits + alarms + rejected + missed
    return {
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / both if both else 0.0,
        "share of yes": (hits + alarms) / total if total else 0.0,
    }


def outcomes(predictions: Predictions) -> np.ndarray:
    """The outcome of each answer, one-hot in the order of `shares`, (Q, 4)."""
    found = np.zeros((len(predictions), 4), int)
    for row, (example, prediction) in enumerate(predictions):
        answered_yes = says_yes(prediction)
        found[row, 2 * (not answered_yes) + (answered_yes != is_yes(example))] = 1
    return found


def share_confidence_intervals(predictions: Predictions, groups: Sequence[str]) -> dict[str, ConfidenceInterval]:
    """Returns 95 % intervals of `shares` over groups of answers, such as those about one image.

    Precision, recall and the share of yes are shares of some answers, and have the exact interval of such; F1 has that
    of the jackknife, and none where no group changes it.
    """
    found = outcomes(predictions)
    hits, alarms, _, missed = found.T.astype(bool)
    parts = {"precision": (hits, hits | alarms), "recall": (hits, hits | missed)}
    parts["share of yes"] = (hits | alarms, np.ones(len(found), bool))
    names = np.array(groups)
    each = {
        name: share_of_answers(right[part], tuple(names[part])) for name, (right, part) in parts.items() if part.any()
    }
    return each | {"F1": _f1_ci(found, names)}


def share_of_answers(right_Q: np.ndarray, groups: tuple[str, ...]) -> ConfidenceInterval:
    """Returns the 95 % interval of the share of right answers, over groups."""
    scores = AnswerScores(right_Q.astype(float)[:, None], groups)
    return share_ci(group_cells([scores]), least=variance_of_independent([scores]))


def _f1_ci(found: np.ndarray, groups: np.ndarray) -> ConfidenceInterval:
    _, numbers = np.unique(groups, return_inverse=True)
    counts = np.zeros((numbers.max() + 1, 4))
    np.add.at(counts, numbers, found)
    ci = jackknife([len(counts)], lambda kept: shares(counts[kept].sum(axis=0))["F1"])
    return ci if ci.low < ci.high else ConfidenceInterval(ci.mean)


def score_pope(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, and precision, recall, F1 and the share of yes of what the model says.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [row_accuracy(*row) for row in predictions]
    hits, alarms, _, missed = counts = outcomes(predictions).sum(axis=0)
    found = shares(counts)
    metrics = {"accuracy": percent(values)} | {name: 100 * value for name, value in found.items()}
    neither = sum(not words_of(prediction) & (NO | YES) for _, prediction in predictions)
    notes = (f"{neither} of {len(predictions)} answers have neither word, and count as yes",) if neither else ()
    rules = dict.fromkeys(metrics, "the same, of answers that are yes")
    rules |= {"accuracy": RULE, "share of yes": "the same, of all answers, and not of the truth"}
    of_some = {"precision": int(hits + alarms), "recall": int(hits + missed)}
    return VLScores("accuracy", metrics, by_kind(("category",), predictions, values), notes, rules, counts=of_some)


SCORER = AnswerScorer(
    score_pope,
    row_accuracy,
    confidence_intervals=share_confidence_intervals,
    scores_answers_only=True,
    wrong=lambda example: "No" if is_yes(example) else "Yes",
)

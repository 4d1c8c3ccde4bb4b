"""Exact match of the last answer of conversations."""

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, check_answered, percent

MARKS = " .,;:!?\"'"
RULES = {
    "accuracy": "without case, repeated white space and punctuation at the ends",
    "exact": "letter by letter but for white space at the ends",
}


def normalized(answer: str) -> str:
    """An answer as `accuracy` compares it: in lower case, with single spaces, without punctuation at its ends.

    An answer of punctuation alone keeps it.
    """
    text = " ".join(answer.casefold().split())
    return text.strip(MARKS) or text


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where prediction and answer are equal once normalized, else 0."""
    return float(normalized(prediction) == normalized(example.answers[0]))


def score_chat(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, the share of normalized answers that are equal, and `exact`, that of equal answers.

    Only white space at the ends does not count for `exact`.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    metrics = {
        "accuracy": percent([row_accuracy(example, prediction) for example, prediction in predictions]),
        "exact": percent([float(prediction.strip() == row.answers[0].strip()) for row, prediction in predictions]),
    }
    return VLScores("accuracy", metrics, rules=RULES)


SCORER = AnswerScorer(score_chat, row_accuracy)

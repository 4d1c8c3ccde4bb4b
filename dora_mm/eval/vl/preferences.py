"""The accuracy of pairs: in how many the chosen answer is preferred, by the margin that a model answers."""

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, check_answered, percent

RULES = {
    "accuracy": "pairs whose margin is above 0, as TRL's rewards/accuracies",
    "margin": "beta times what the chosen answer gained on the rejected one, in nats",
}


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the margin of a pair is above 0, else 0: a model that prefers neither is wrong, as in TRL."""
    return float(float(prediction) > 0)


def score_preferences(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, and the mean `margin` x 100.

    Raises:
        ValueError: There are no predictions.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    metrics = {"accuracy": percent(values), "margin": percent([float(prediction) for _, prediction in predictions])}
    return VLScores("accuracy", metrics, rules=RULES)


SCORER = AnswerScorer(score_preferences, row_accuracy)

"""Accuracy of answers that name an option in words, as LLM-Adapters scores commonsense questions."""

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.readers.commonsense import named_option
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, check_answered, percent, table

RULE = "LLM-Adapters' commonsense_evaluate.py: the option that is named first, in its own words"
NEXT_RESPONSE = "### Response:"  # what follows this is of another answer, which a model makes up


def chosen(example: Example, prediction: str) -> str | None:
    """The option that a prediction names first; None if it names none."""
    return named_option(prediction.partition(NEXT_RESPONSE)[0], example.options)


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction names the right option first, else 0."""
    return float(chosen(example, prediction) == named_option(example.answers[0], example.options))


def score_options(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, with a table by the right `answer`, which shows whether the model prefers an option.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    groups: dict[str, list[float]] = {}
    for (example, _), value in zip(predictions, values, strict=True):
        groups.setdefault(named_option(example.answers[0], example.options) or "", []).append(value)
    invalid = sum(chosen(example, prediction) is None for example, prediction in predictions)
    notes = (f"{invalid} of {len(predictions)} predictions name no option and count as wrong",) if invalid else ()
    return VLScores("accuracy", {"accuracy": percent(values)}, {"answer": table(groups)}, notes, {"accuracy": RULE})


SCORER = AnswerScorer(score_options, row_accuracy)

"""Accuracy of multiple choice questions, by the letter of the chosen option."""

import re
from string import ascii_uppercase

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.chat import normalized
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_answer, by_kind, check_answered, percent

LETTER = re.compile(r"\(?([A-Z])(?:[).:]|[).:]\s.*)?", re.DOTALL)  # "B", "B.", "(B)", "B. a red car"; not "A red car"

RULE = "the letter of an option first, or alone, or the whole text of one; no judge"


def chosen_letter(example: Example, prediction: str) -> str | None:
    """Returns the letter of the option that a prediction names: by its letter or by its text; None if it names none."""
    letters = ascii_uppercase[: len(example.options)]
    match = LETTER.fullmatch(prediction.strip())
    if match and match.group(1) in letters:
        return match.group(1)
    texts = [normalized(option) for option in example.options]
    text = normalized(prediction)
    return letters[texts.index(text)] if text in texts else None


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction names the right option, else 0."""
    return float(chosen_letter(example, prediction) == example.answers[0])


def score_choice(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, with a table by `category`.

    A table by the right `answer` shows whether the model prefers a letter.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    tables = {**by_kind(("category",), predictions, values), "answer": by_answer(predictions, values)}
    invalid = sum(chosen_letter(example, prediction) is None for example, prediction in predictions)
    notes = (f"{invalid} of {len(predictions)} predictions name no option and count as wrong",) if invalid else ()
    return VLScores("accuracy", {"accuracy": percent(values)}, tables, notes, {"accuracy": RULE})


SCORER = AnswerScorer(score_choice, row_accuracy)

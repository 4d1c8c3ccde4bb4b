"""Accuracy of questions about video clips, as the VALUE benchmark's tools compute it."""

import re

from dora_mm.data.vl.example import Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_answer, check_answered, exact_match, percent

RULE = "VALUE's tools: a and the number of the choice, letter by letter"
CHOICE = re.compile(r"a(\d)")


def choice(text: str) -> int | None:
    """Returns 3 for "a3", None for text that is not a choice."""
    match = CHOICE.fullmatch(text.strip())
    return int(match.group(1)) if match else None


def score_clip_choices(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, by exact match of `a{index}`.

    A table by the right `answer` shows whether the model prefers a choice.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [exact_match(example, prediction) for example, prediction in predictions]
    invalid = sum(choice(prediction) is None for _, prediction in predictions)
    notes = (f"{invalid} of {len(predictions)} predictions name no choice and count as wrong",) if invalid else ()
    tables = {"answer": by_answer(predictions, values)}
    return VLScores("accuracy", {"accuracy": percent(values)}, tables, notes, {"accuracy": RULE})


SCORER = AnswerScorer(score_clip_choices, exact_match)

"""Relaxed accuracy of ChartQA and PlotQA: numbers may be 5 % off, all other answers must be equal.

`relaxed_correctness` of pix2struct (pix2struct/metrics.py), after https://arxiv.org/abs/2203.10244, section 5.1.
"""

import re
from collections.abc import Callable, Sequence

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import mean_scorer

TOLERANCE = 0.05
YEAR = re.compile(r"(1[89]|20)\d\d")


def number(text: str) -> float | None:
    """Returns a number, a percentage as its hundredth; None for what is none, such as "1,200" or "12 %"."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_near(reference: str, prediction: str) -> bool:
    """Returns whether a prediction is right; a reference of 0, or of no number, must be equal but for case."""
    found, wanted = number(prediction), number(reference)
    if found is None or not wanted:
        return prediction.lower() == reference.lower()
    return abs(found - wanted) / abs(wanted) <= TOLERANCE


def _any(read: Callable[[str], str]) -> Callable[[Example, str], float]:
    return lambda example, prediction: float(any(is_near(answer, read(prediction)) for answer in example.answers))


def _notes(predictions: Predictions, values: Sequence[float]) -> Sequence[str]:
    """How many other years count as right, since 2010 is within 5 % of 2019."""
    right = (row for row, value in zip(predictions, values, strict=True) if value)
    years = sum(
        any(YEAR.fullmatch(answer) for answer in example.answers) and prediction not in example.answers
        for example, prediction in right
    )
    return [f"{years} answers are another year than the right one, and right by the 5 %"] if years else []


SCORER = mean_scorer(
    {
        "relaxed accuracy": (
            _any(str),
            "pix2struct's relaxed_correctness: within 5 %, 12% is 0.12; 1,200 is no number",
        ),
        "relaxed accuracy (stripped)": (
            _any(str.strip),
            "the same on answers without outer white space, as VLMEvalKit",
        ),
    },
    scores_answers_only=True,
    notes=_notes,
)

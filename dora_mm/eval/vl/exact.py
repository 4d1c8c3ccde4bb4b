"""Exact match with any reference, with and without folding case, white space and punctuation at the ends."""

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.chat import RULES, normalized
from dora_mm.eval.vl.scores import mean_scorer


def strict(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction is a reference but for white space at the ends, else 0."""
    return float(prediction.strip() in [answer.strip() for answer in example.answers])


def folded(example: Example, prediction: str) -> float:
    """Returns 1 where prediction and a reference are equal once normalized, else 0."""
    return float(normalized(prediction) in map(normalized, example.answers))


SCORER = mean_scorer(
    {
        "exact match": (strict, RULES["exact"]),
        "exact match (folded)": (folded, RULES["accuracy"]),
    },
    scores_answers_only=True,
)

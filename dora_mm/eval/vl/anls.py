"""ANLS: how near an answer is to the nearest reference in edits, for DocVQA, InfographicVQA and ST-VQA.

Average normalised Levenshtein similarity, https://arxiv.org/abs/1907.00490, equation 1. Scripts differ in the length
that edits are divided by, and in white space.
"""

from collections.abc import Callable

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import mean_scorer

LEAST = 0.5  # a lower similarity counts as 0


def edits(first: str, second: str) -> int:
    """Returns the Levenshtein distance: the fewest characters to insert, delete or replace."""
    if len(first) < len(second):
        first, second = second, first
    above = list(range(len(second) + 1))
    for row, a in enumerate(first, 1):
        line = [row]
        for column, b in enumerate(second, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (a != b)))
        above = line
    return above[-1]


def similarity(reference: str, prediction: str, length: int) -> float:
    """Returns 1 - edits / length, or 0 where that is below 0.5; 1 where both are empty.

    Args:
        reference: What is compared, after normalisation.
        prediction: What is compared, after normalisation.
        length: What edits are divided by.
    """
    if not length:
        return 1.0
    if abs(len(reference) - len(prediction)) > (1 - LEAST) * length:  # at least so many edits
        return 0.0
    found = 1 - edits(reference, prediction) / length
    return found if found >= LEAST else 0.0


def official(reference: str, prediction: str) -> float:
    """As the script of the evaluation site, rrc.cvc.uab.es, which divides by the lengths before normalisation."""
    length = max(len(reference.upper()), len(prediction.upper()))
    return similarity(_joined(reference), _joined(prediction), length)


def _joined(text: str) -> str:
    return " ".join(text.strip().lower().split())


def stripped(reference: str, prediction: str) -> float:
    """As mmf's STVQAANLSEvaluator."""
    reference, prediction = reference.lower().strip(), prediction.lower().strip()
    return similarity(reference, prediction, max(len(reference), len(prediction)))


def lowered(reference: str, prediction: str) -> float:
    """As `anls_metric` of pix2struct: white space counts, and a similarity of just 0.5 is 0, too."""
    reference, prediction = reference.lower(), prediction.lower()
    found = similarity(reference, prediction, max(len(reference), len(prediction)))
    return found if found > LEAST else 0.0


def _nearest(one: Callable[[str, str], float]) -> Callable[[Example, str], float]:
    return lambda example, prediction: max(one(reference, prediction) for reference in example.answers)


SCORER = mean_scorer(
    {
        "ANLS": (_nearest(official), "script of rrc.cvc.uab.es: white space joined, edits divided by raw lengths"),
        "ANLS (mmf)": (_nearest(stripped), "mmf's STVQAANLSEvaluator: stripped, edits divided by those lengths"),
        "ANLS (pix2struct)": (_nearest(lowered), "pix2struct's anls_metric: white space counts, and 0.5 is 0"),
    },
    scores_answers_only=True,
)

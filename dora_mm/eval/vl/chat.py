"""Exact match, or ROUGE-L, of the last answer of conversations."""

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.rouge import RULE, row_rouge_l
from dora_mm.eval.vl.scores import mean_scorer

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


def row_exact(example: Example, prediction: str) -> float:
    """Returns 1 where prediction and answer are equal but for white space at the ends, else 0."""
    return float(prediction.strip() == example.answers[0].strip())


EXACT = {"accuracy": (row_accuracy, RULES["accuracy"]), "exact": (row_exact, RULES["exact"])}
ROUGE_L = {"ROUGE-L": (row_rouge_l, RULE)}
SCORER = mean_scorer(EXACT | ROUGE_L)  # of short answers
SENTENCES = mean_scorer(ROUGE_L | EXACT)

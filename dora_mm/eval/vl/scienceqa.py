"""ScienceQA accuracy, with letters read as LLaVA's llava/eval/eval_science_qa.py does.

ScienceQA's own script takes "The answer is X." alone, and guesses where that is not there once.
"""

import re
from string import ascii_uppercase

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import mean_scorer

LETTERS = ascii_uppercase[:5]
STATED = re.compile(r"The answer is ([A-Z]).")


def letter_of(answer: str) -> str | None:
    """Returns the letter that an answer names: "B", "B. ..." or once "The answer is B."; None if it names none."""
    if answer in list(LETTERS):
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    return _stated(answer)


def _stated(answer: str) -> str | None:
    """The letter behind "The answer is", which any character has to follow; None if that is not there once."""
    found = STATED.findall(answer)
    return found[0] if len(found) == 1 else None


def _llava(example: Example, prediction: str) -> float:
    return float(letter_of(prediction) == example.answers[0])


def own_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the answer is right by ScienceQA's own script, else 0."""
    return float(_stated(prediction.strip()) == example.answers[0])


SCORER = mean_scorer(
    {
        "accuracy": (_llava, "LLaVA's eval_science_qa.py: B, B. text or once The answer is B.; all else is wrong"),
        "accuracy (own script)": (
            own_accuracy,
            "ScienceQA's run_gpt3.py: The answer is B. once; where it guesses: wrong",
        ),
    },
    headings=("subject", "context", "grade"),
)

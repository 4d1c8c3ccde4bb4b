"""Multiple choice by the letter or the text of one option, as VLMEvalKit reads answers without asking a judge."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.scores import mean_scorer

SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
LAST_WORDS = 4  # among which a letter has to be
NONE = "Z"  # the letter of no option, which VLMEvalKit takes for a refusal
FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def letter_of(answer: str, options: Sequence[str]) -> str | None:
    """Returns the letter of the only option that is named, NONE for a refusal, None where none is named or several.

    As `can_infer` of vlmeval/utils/matching_util.py.
    """
    return _by_letter(answer, ascii_uppercase[: len(options)]) or _by_text(answer.lower(), options)


def _by_letter(answer: str, letters: str) -> str | None:
    if FAILED in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NONE
    words = answer.translate(SPACED).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - LAST_WORDS:
        return found[0]
    if not found and NONE in words:
        return NONE
    stated = STATED.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in letters else None


def _by_text(answer: str, options: Sequence[str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options)):
        return None
    found = [letter for letter, option in zip(ascii_uppercase, options, strict=False) if option.lower() in answer]
    return found[0] if len(found) == 1 else None


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction names the right option, else 0."""
    return float(letter_of(prediction, example.options) == example.answers[0])


def unread(predictions, values) -> list[str]:
    """How many predictions name no option, or several."""
    count = sum(letter_of(prediction, example.options) in (None, NONE) for example, prediction in predictions)
    return [
        f"{count} of {len(predictions)} answers name no single option: wrong, where a classifier is asked otherwise"
    ]


SCORER = mean_scorer(
    {"accuracy": (row_accuracy, "VLMEvalKit's can_infer: one letter or one option's text; no judge")},
    headings=("category",),
    notes=unread,
)

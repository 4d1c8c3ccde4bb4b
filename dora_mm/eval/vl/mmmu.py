"""MMMU and MMMU-Pro, by the parsers of their repository, but for its random guesses.

Where a parser finds no option, the scripts draw one; here the answer counts as wrong, and what the draws would add on
average stands beside the score. Rules of mmmu/utils/eval_utils.py and mmmu-pro/evaluate.py of MMMU-Benchmark/MMMU.
"""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, percent

# How a letter may be written, first found first taken, and how it is written where several are and the last one counts
MMMU_FORMS = (("({})", "({})"), (" {} ", " {} "))
PRO_FORMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
ENDS = ",.!?;:'"  # taken off both ends, each once in this order
FEWEST_WORDS = 6  # of an answer in which options are looked for by their text
BEFORE_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset(":,.!?;'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = str | float


def mmmu_letter(answer: str, options: Sequence[str]) -> str | None:
    """Returns the letter that MMMU's parser finds; None where it would draw one."""
    return _letter(answer, options, MMMU_FORMS)


def pro_letter(answer: str, options: Sequence[str]) -> str | None:
    """Returns the letter that MMMU-Pro's parser finds; None where it would draw one."""
    _, mark, letters = answer.rpartition("Answer:")
    named = [letter for letter in ascii_uppercase[: len(options)] if mark and letter in letters]
    return named[0] if len(named) == 1 else _letter(answer, options, PRO_FORMS)


def _letter(answer: str, options: Sequence[str], forms: Sequence[tuple[str, str]]) -> str | None:
    for mark in ENDS:
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = ascii_uppercase[: len(options)]
    for form, template in forms:
        if found := [letter for letter in letters if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(template.format(letter)))
    lowered = text.lower()
    texts = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
    if len(text.split()) < FEWEST_WORDS:
        return None
    return max((x for x in letters if texts[x] in lowered), key=lambda x: lowered.rfind(texts[x]), default=None)


def values_of(text: str) -> list[Value]:
    """The values that a text is compared as: a number of two decimals, or lower case; one character with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_values(answer: str) -> set[Value]:
    """The values that an answer in words may mean: what is behind words such as "is", and the numbers in it."""
    full_text = answer.strip().strip(".").lower()
    *earlier, last = full_text.split("\n")
    keys = [_behind(line, BEFORE_KEYS) for line in earlier] + [_behind(last, (*BEFORE_KEYS, "="))]
    texts = [key for key in keys if key and key not in TRIVIAL] or [full_text]
    numbers = [number for text in texts for pattern in NUMBERS for number in pattern.findall(text)]
    return {value for text in (*texts, *numbers) for value in values_of(text)}


def _behind(line: str, words: Sequence[str]) -> str:
    """The shortest end of a line behind one of the words; "" where it has none, or nothing behind the last."""
    found = ""
    for word in words:
        if word in line:
            end = line.split(word)[-1].strip()
            found = end if not found or len(end) < len(found) else found
    return found


def is_right(references: Sequence[str], values: set[Value]) -> bool:
    """Whether a value is a reference, or a text among them has one in it."""
    wanted = [value for reference in references for value in values_of(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in wanted for value in values)


def _scorer(letter_of, rule: str) -> AnswerScorer:
    def accuracy(example: Example, prediction: str) -> float:
        if example.options:
            return float(letter_of(prediction, example.options) in example.answers)
        return float(is_right(example.answers, open_values(prediction)))

    def compute(predictions: Predictions) -> VLScores:
        check_answered(predictions)
        values = [accuracy(*row) for row in predictions]
        num_options = [
            len(row.options) for row, text in predictions if row.options and not letter_of(text, row.options)
        ]
        guessed = 100 * sum(1 / count for count in num_options) / len(predictions)
        metrics = {"accuracy": percent(values), "accuracy with guesses": percent(values) + guessed}
        rules: Mapping[str, str] = {
            "accuracy": f"{rule}; an answer that names no option is wrong",
            "accuracy with guesses": "the same, plus what its random guesses give on average",
        }
        notes = (f"{len(num_options)} of {len(predictions)} answers name no option, where the script guesses",)
        return VLScores("accuracy", metrics, by_kind(("subject",), predictions, values), notes, rules)

    return AnswerScorer(compute, accuracy)


SCORER = _scorer(mmmu_letter, "MMMU's eval_utils.py")
PRO = _scorer(pro_letter, "MMMU-Pro's evaluate.py")

"""A-OKVQA, by evaluation/eval_predictions.py of allenai/aokvqa: the right choice, or what people answer directly."""

from string import ascii_uppercase

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.choice import chosen_letter
from dora_mm.eval.vl.scores import mean_scorer

ENOUGH = 3  # of the ten direct answers


def _choice(example: Example, prediction: str) -> float:
    """The script takes the text of a choice and refuses all else; a letter stands for its choice."""
    if prediction in example.options:
        return float(example.options[ascii_uppercase.index(example.answers[0])] == prediction)
    return float(chosen_letter(example, prediction) == example.answers[0])


def _direct(example: Example, prediction: str) -> float:
    return min(1.0, example.raw_answers.count(prediction) / ENOUGH)


SCORER = mean_scorer(
    {"accuracy": (_choice, "A-OKVQA's eval_predictions.py: the text of a choice; here also its letter")}
)
DIRECT = mean_scorer({"accuracy": (_direct, "A-OKVQA's eval_predictions.py: min(1, n / 3), equal letter by letter")})

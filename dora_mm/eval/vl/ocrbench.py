"""OCRBench: an answer is right if a reference is somewhere in it, as OCRBench/example.py of MultimodalOCR decides."""

from collections.abc import Callable

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, percent

# The data set whose case counts, and whose spaces do not, and its category, which VLMEvalKit's file has instead
FORMULAS = {"HME100k", "Handwritten Mathematical Expression Recognition"}
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}  # full-width characters of ASCII


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _folded(text: str) -> str:
    return _line(text.translate(WIDE))


def _is_in(read: Callable[[str], str]) -> Callable[[Example, str], float]:
    def accuracy(example: Example, prediction: str) -> float:
        form = _formula if FORMULAS.intersection(example.kinds) else read
        text = form(prediction)
        return float(any(form(answer) in text for answer in example.answers))

    return accuracy


row_accuracy, folded_accuracy = _is_in(_line), _is_in(_folded)


def score_ocrbench(predictions: Predictions) -> VLScores:
    """Computes the share of right answers and their number, which is what OCRBench prints for its 1,000 questions.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [row_accuracy(*row) for row in predictions]
    folded = percent([folded_accuracy(*row) for row in predictions])
    return VLScores(
        "accuracy",
        {"accuracy": percent(values), "accuracy (full width folded)": folded},
        by_kind(("type", "dataset"), predictions, values),
        (f"{sum(values):.0f} points of {len(predictions)}",),
        {
            "accuracy": "MultimodalOCR's OCRBench/example.py (2023): a reference in it, case ignored but in HME100k",
            "accuracy (full width folded)": "lmms-eval since 2026-07-30 (#1415): full-width characters as ASCII, too",
        },
    )


SCORER = AnswerScorer(score_ocrbench, row_accuracy)

"""TextVQA accuracy: how many of ten people gave the answer, as TextVQAAccuracyEvaluator of mmf counts it."""

from functools import lru_cache

from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS, normalize_answer
from dora_mm.eval.vl.scores import mean_scorer
from dora_mm.eval.vl.vqa import vqa_accuracy


@lru_cache(maxsize=2**16)
def normalized(answer: str) -> str:
    """The form in which mmf's EvalAIAnswerProcessor compares answers: its tokeniser runs before VQA v2's steps."""
    return normalize_answer(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns min(1, 0.3 n) for an answer that n of ten people gave.

    Raises:
        ValueError: The example does not have ten answers; the message names the question.
    """
    if len(example.raw_answers) != NUM_ANSWERS:
        count = len(example.raw_answers)
        raise ValueError(f"question {example.id}: TextVQA accuracy is defined over ten answers, got {count}")
    found = normalized(prediction)
    return min(10, 3 * sum(normalized(answer) == found for answer in example.raw_answers)) / 10


def _as_vqa(example: Example, prediction: str) -> float:
    return vqa_accuracy(prediction, example.raw_answers)


SCORER = mean_scorer(
    {
        "accuracy": (row_accuracy, "mmf's TextVQAAccuracyEvaluator: its tokeniser, then VQA v2's steps, on both sides"),
        "accuracy (VQA v2)": (_as_vqa, "VQA v2's script, which some tools take for TextVQA"),
    }
)

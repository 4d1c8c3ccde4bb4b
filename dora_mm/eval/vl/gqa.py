"""GQA accuracy: exact match, as in the official evaluation script, and as other tools count it."""

from dora_mm.data.vl.example import Predictions
from dora_mm.eval.vl.exact import folded
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, exact_match, percent

FOLDED = "accuracy (folded)"
RULES = {
    "accuracy": "GQA's eval.py: equal letter by letter; Yes. is not yes",
    "open": "the same, of questions of the structural type query",
    "binary": "the same, of all others",
    FOLDED: "without case and punctuation at the ends, as lmms-eval and LLaVA",
}


def score_gqa(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, with tables by `structural` and `semantic` type, and `accuracy (folded)`.

    Where the questions have types, also `open` (structural type "query") and `binary` (all others).

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [exact_match(example, prediction) for example, prediction in predictions]
    tables = by_kind(("structural", "semantic"), predictions, values)
    metrics = {"accuracy": percent(values), FOLDED: percent([folded(*row) for row in predictions])}
    counts = {}
    for name, is_open in (("open", True), ("binary", False)):
        selected = [
            value
            for (example, _), value in zip(predictions, values, strict=True)
            if example.kinds and (example.kinds[0] == "query") == is_open
        ]
        if selected:
            metrics[name], counts[name] = percent(selected), len(selected)
    return VLScores("accuracy", metrics, tables, rules={name: RULES[name] for name in metrics}, counts=counts)


SCORER = AnswerScorer(score_gqa, exact_match)

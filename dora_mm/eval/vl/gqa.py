"""GQA accuracy: exact match, as in the official evaluation script."""

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import VLScores, by_kind, check_answered, percent


def row_accuracy(example: Example, prediction: str) -> float:
    return float(prediction.strip() == example.answers[0])


def score_gqa(rows: Predictions) -> VLScores:
    """`accuracy`, and where the questions have types, `open` (structural type "query") and `binary` (all others), with
    tables by `structural` and `semantic` type."""
    check_answered(rows)
    values = [row_accuracy(example, prediction) for example, prediction in rows]
    tables = by_kind(("structural", "semantic"), rows, values)
    metrics = {"accuracy": percent(values)}
    for name, is_open in (("open", True), ("binary", False)):
        of_name = [
            value
            for (example, _), value in zip(rows, values, strict=True)
            if example.kinds and (example.kinds[0] == "query") == is_open
        ]
        if of_name:
            metrics[name] = percent(of_name)
    return VLScores("gqa", "accuracy", metrics, tables)

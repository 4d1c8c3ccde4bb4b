"""NLVR2 accuracy and consistency, as in the official evaluation script."""

from collections import defaultdict

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import VLScores, check_answered, percent, table


def row_accuracy(example: Example, prediction: str) -> float:
    return float(prediction.strip().lower() == example.answers[0].lower())


def sentence_of(identifier: str) -> str:
    """The identifier (split-set-pair-sentence) without its pair: the same for one sentence with all its pictures.

    Raises:
        ValueError: fewer than three fields.
    """
    fields = identifier.split("-")
    if len(fields) < 3:
        raise ValueError(f"the identifier {identifier!r} is not of the form split-set-pair-sentence, as dev-850-0-1 is")
    return "-".join([*fields[:2], *fields[3:]])


def score_nlvr2(rows: Predictions) -> VLScores:
    """`accuracy`; `consistency`, the share of sentences that are judged rightly with every pair of pictures; a table by
    the right `answer`."""
    check_answered(rows)
    values = [row_accuracy(example, prediction) for example, prediction in rows]
    sentences, answers = defaultdict(list), defaultdict(list)
    for (example, _), value in zip(rows, values, strict=True):
        sentences[sentence_of(example.id)].append(value)
        answers[example.answers[0]].append(value)
    metrics = {"accuracy": percent(values), "consistency": percent([min(group) for group in sentences.values()])}
    return VLScores("nlvr2", "accuracy", metrics, {"answer": table(answers)})

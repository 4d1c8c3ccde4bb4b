"""NLVR2 accuracy and consistency, as in the official evaluation script."""

from collections import defaultdict

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_answer, check_answered, percent

RULES = {
    "accuracy": "NLVR2's metrics.py: true or false before a comma, in lower or upper case, with no space before it",
    "consistency": "NLVR2's metrics.py: sentences that are right for every pair of images",
}


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction is the answer, in lower or upper case, else 0.

    The script reads it from a line `identifier,prediction`: white space at the end of the line is not read, nor
    what follows a comma.
    """
    field = prediction.rstrip().partition(",")[0]
    return float(field.lower() == example.answers[0].lower())


def sentence_of(identifier: str) -> str:
    """Returns the identifier (split-set-pair-sentence) without its pair, the same for all image pairs of a sentence.

    Raises:
        ValueError: The identifier has fewer than three fields.
    """
    fields = identifier.split("-")
    if len(fields) < 3:
        raise ValueError(f"the identifier {identifier!r} is not of the form split-set-pair-sentence, as dev-850-0-1 is")
    return "-".join([*fields[:2], *fields[3:]])


def sentence_set(example: Example) -> str | None:
    """Returns the set of a sentence, all of which are about the same pairs of images; None: the id names none."""
    fields = example.id.split("-")
    return "-".join(fields[:2]) if len(fields) == 4 else None


def score_nlvr2(predictions: Predictions) -> VLScores:
    """Computes `accuracy` and `consistency`, with a table by the right `answer`.

    Consistency is the share of sentences whose predictions are right for every pair of images.

    Raises:
        ValueError: There are no predictions, an example has no answer, or an identifier is not one of NLVR2.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    sentences = defaultdict(list)
    for (example, _), value in zip(predictions, values, strict=True):
        sentences[sentence_of(example.id)].append(value)
    metrics = {"accuracy": percent(values), "consistency": percent([min(group) for group in sentences.values()])}
    tables, counts = {"answer": by_answer(predictions, values)}, {"consistency": len(sentences)}
    return VLScores("accuracy", metrics, tables, rules=RULES, counts=counts)


SCORER = AnswerScorer(score_nlvr2, row_accuracy, sentence_set, "all sentences of a set of NLVR2")

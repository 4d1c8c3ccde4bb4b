"""MMBench's circular evaluation: a question counts where it is answered rightly with its options in every order.

The rows of a question have ids that are equal up to multiples of a million, as VLMEvalKit's TSV files have them; the
first is the question itself. Answers are read without a classifier, see letters.py.
"""

from collections import defaultdict

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.letters import row_accuracy, unread
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, percent

ORDERS = 1_000_000


def question_of(example: Example) -> str:
    """The id of a question, whichever order its options are in."""
    return str(int(example.id) % ORDERS) if example.id.isdecimal() else example.id


def score_circular(predictions: Predictions) -> VLScores:
    """Computes `circular`, the share of questions that are right in every order, and `accuracy`, that of rows.

    Raises:
        ValueError: There are no predictions, an example has no answer, or a question lacks its first order.
    """
    check_answered(predictions)
    groups: dict[str, list[tuple[Example, float]]] = defaultdict(list)
    for example, prediction in predictions:
        groups[question_of(example)].append((example, row_accuracy(example, prediction)))
    missing = [key for key, rows in groups.items() if all(example.id != key for example, _ in rows)]
    if missing:
        raise ValueError(
            f"question {missing[0]} has other orders of its options, but not the first: its id is {missing[0]}"
        )
    values = [min(value for _, value in rows) for rows in groups.values()]
    firsts = [(next(example for example, _ in rows if example.id == key), "") for key, rows in groups.items()]
    most = max(map(len, groups.values()))
    return VLScores(
        "circular",
        {"circular": percent(values), "accuracy": percent([value for rows in groups.values() for _, value in rows])},
        by_kind(("category",), firsts, values),
        (f"{len(groups)} questions in up to {most} orders", *unread(predictions, values)),
        {
            "circular": "right in all orders; VLMEvalKit's can_infer: one letter or one option's text; no judge",
            "accuracy": "the same of single rows",
        },
        counts={"circular": len(groups)},
    )


SCORER = AnswerScorer(score_circular, row_accuracy, unit=question_of)

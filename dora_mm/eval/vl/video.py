"""Scores of the video tasks as the VALUE benchmark's tools compute them."""

import re
from collections import defaultdict
from collections.abc import Sequence

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.captions import CaptionScores, caption_notes, caption_scores, group_by_id
from dora_mm.eval.vl.scores import VLScores, check_answered, percent, table

CHOICE = re.compile(r"a(\d)")


def choice(text: str) -> int | None:
    """ "a3" -> 3; None for anything else."""
    found = CHOICE.fullmatch(text.strip())
    return int(found.group(1)) if found else None


def row_accuracy(example: Example, prediction: str) -> float:
    return float(prediction.strip() == example.answers[0])


def score_video_questions(task: str, rows: Predictions) -> VLScores:
    """`accuracy`, by exact match of `a{index}`; a table by the right `answer`, which shows a preferred choice."""
    check_answered(rows)
    values = [row_accuracy(example, prediction) for example, prediction in rows]
    answers = defaultdict(list)
    for (example, _), value in zip(rows, values, strict=True):
        answers[example.answers[0]].append(value)
    strange = sum(choice(prediction) is None for _, prediction in rows)
    notes = (f"{strange} of {len(rows)} predictions name no choice and count as wrong",) if strange else ()
    return VLScores(task, "accuracy", {"accuracy": percent(values)}, {"answer": table(answers)}, notes)


def score_video_captions(task: str, rows: Predictions, *, meteor: bool = True) -> VLScores:
    """As score_captions, each clip against all its references (against one at a time, CIDEr is another number).

    The table by `type` holds the mean CIDEr of the clips that have a reference of this type. As in VALUE, letters
    beyond ASCII become spaces.
    """
    references, found = clip_scores(rows, meteor=meteor)
    tables = {"type": table(by_type)} if (by_type := _by_type(rows, list(references), found.each)) else {}
    return VLScores(task, "CIDEr", found.metrics, tables, caption_notes(references, found))


def clip_scores(rows: Predictions, *, meteor: bool = True) -> tuple[dict[str, list[str]], CaptionScores]:
    """References by id, in the order in which `each` is."""
    references, predictions = group_by_id(rows)
    found = caption_scores(
        {key: [_ascii(text) for text in texts] for key, texts in references.items()},
        {key: _ascii(text) for key, text in predictions.items()},
        meteor=meteor,
    )
    return references, found


def _by_type(rows: Predictions, ids: Sequence[str], each: Sequence[float]) -> dict[str, list[float]]:
    types = defaultdict(set)
    for example, _ in rows:
        types[example.id].update(example.kinds)
    grouped = defaultdict(list)
    for key, value in zip(ids, each, strict=False):  # no values where the metrics were skipped
        for name in types[key]:
            grouped[name].append(value / 100)
    return grouped


def _ascii(text: str) -> str:
    return "".join(letter if letter.isascii() else " " for letter in text)

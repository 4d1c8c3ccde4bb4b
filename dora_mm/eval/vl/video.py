"""Scores of the video tasks as the VALUE benchmark's tools compute them."""

import re
from collections import defaultdict
from collections.abc import Sequence

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.captions import CaptionScores, caption_notes, caption_scores, group_by_id
from dora_mm.eval.vl.scores import VLScores, by_answer, check_answered, percent, table

CHOICE = re.compile(r"a(\d)")


def choice(text: str) -> int | None:
    """Returns 3 for "a3", None for text that is not a choice."""
    match = CHOICE.fullmatch(text.strip())
    return int(match.group(1)) if match else None


def row_accuracy(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction is the answer, else 0."""
    return float(prediction.strip() == example.answers[0])


def score_video_questions(task: str, predictions: Predictions) -> VLScores:
    """Computes `accuracy`, by exact match of `a{index}`.

    A table by the right `answer` shows whether the model prefers a choice.

    Raises:
        ValueError: There are no predictions, or an example has no answer.
    """
    check_answered(predictions)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    invalid = sum(choice(prediction) is None for _, prediction in predictions)
    notes = (f"{invalid} of {len(predictions)} predictions name no choice and count as wrong",) if invalid else ()
    return VLScores(task, "accuracy", {"accuracy": percent(values)}, {"answer": by_answer(predictions, values)}, notes)


def score_video_captions(task: str, predictions: Predictions, *, meteor: bool = True) -> VLScores:
    """Computes the metrics of `score_captions`, each clip against all its references (one at a time, CIDEr differs).

    The table by `type` contains the mean CIDEr of the clips that have a reference of this type. As in VALUE, characters
    that are not ASCII become spaces.

    Args:
        task: "tvc" or "yc2c".
        predictions: Examples with predicted captions.
        meteor: Whether to compute METEOR.

    Raises:
        ValueError: There are no predictions, an example has no references, or an id has two predictions.
    """
    references, found = clip_scores(predictions, meteor=meteor)
    by_type = _by_type(predictions, list(references), found.per_caption)
    tables = {"type": table(by_type)} if by_type else {}
    return VLScores(task, "CIDEr", found.metrics, tables, caption_notes(references, found))


def clip_scores(predictions: Predictions, *, meteor: bool = True) -> tuple[dict[str, list[str]], CaptionScores]:
    """Scores captions of clips; as `image_scores`, on ASCII texts."""
    references, captions = group_by_id(predictions)
    found = caption_scores(
        {key: [_ascii(text) for text in texts] for key, texts in references.items()},
        {key: _ascii(text) for key, text in captions.items()},
        meteor=meteor,
    )
    return references, found


def _by_type(predictions: Predictions, ids: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    types = defaultdict(set)
    for example, _ in predictions:
        types[example.id].update(example.kinds)
    grouped = defaultdict(list)
    for key, value in zip(ids, values, strict=False):  # no values where the metrics were skipped
        for name in types[key]:
            grouped[name].append(value / 100)
    return grouped


def _ascii(text: str) -> str:
    return "".join(character if character.isascii() else " " for character in text)

"""VQA accuracy, equal to that of the official evaluation script of VQA v2, its slips included."""

from collections.abc import Sequence
from typing import Literal

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.vqa_answers import normalize_answer, strip_punctuation, tidy
from dora_mm.eval.vl.scores import VLScores, by_kind, check_answered, is_answered, percent

Mode = Literal["official", "lavis"]
NUM_ANSWERS = 10


def vqa_accuracy(prediction: str, raw_answers: Sequence[str], mode: Mode = "official") -> float:
    """min(1, 0.3 n) for the n of ten people who said the same: the mean over them of min(1, matches among the others
    / 3).

    Args:
        raw_answers: the ten, as the annotations have them.
        mode: "official" normalises both sides, and neither where all ten agree: then "Yes" is not "yes". "lavis" is
            the copy of an older script that LAVIS (and with it BLIP) scores by: predictions are always normalised,
            answers only lose punctuation, so that ten times "none", or "dont know" among others, is never matched.

    Raises:
        ValueError: not ten answers.
    """
    if len(raw_answers) != NUM_ANSWERS:
        raise ValueError(f"VQA accuracy is defined over ten answers, and here are {len(raw_answers)}")
    if mode == "official":
        prediction, answers = tidy(prediction), [tidy(answer) for answer in raw_answers]
        if len(set(answers)) > 1:
            prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    else:
        prediction, answers = normalize_answer(prediction), list(raw_answers)
        if len(set(answers)) > 1:
            answers = [strip_punctuation(answer) for answer in answers]
    return min(10, 3 * answers.count(prediction)) / 10


def label_accuracy(prediction: str, answers: Sequence[str], scores: Sequence[float]) -> float:
    """The score of the label that equals the prediction after normalisation, 0 where none does.

    For files that hold labels in place of the ten answers (the Karpathy form): the same as the official accuracy but
    where all ten agree or the file leaves rare answers out.
    """
    said = normalize_answer(prediction)
    return max(
        (score for answer, score in zip(answers, scores, strict=True) if normalize_answer(answer) == said), default=0.0
    )


def row_accuracy(example: Example, prediction: str, mode: Mode = "official") -> float:
    """By the ten answers where the file has them, else by its labels. ValueError names the question."""
    if not example.raw_answers:
        return label_accuracy(prediction, example.answers, example.scores)
    try:
        return vqa_accuracy(prediction, example.raw_answers, mode)
    except ValueError as error:
        raise ValueError(f"question {example.id}: {error}") from error


def score_vqa(rows: Predictions, mode: Mode = "official") -> VLScores:
    """`accuracy`, tables by `answer_type` and `question_type`.

    Raises:
        ValueError: no row has answers, or one has raw answers that are not ten.
    """
    check_answered(rows, every=False)
    values = [row_accuracy(example, prediction, mode) for example, prediction in rows]
    tables = by_kind(("answer_type", "question_type"), rows, values)
    return VLScores("vqa", "accuracy", {"accuracy": percent(values)}, tables, _notes(rows, mode))


def _notes(rows: Predictions, mode: Mode) -> tuple[str, ...]:
    by_labels = sum(not example.raw_answers for example, _ in rows)
    empty = sum(not is_answered(example) for example, _ in rows)
    notes = []
    if by_labels < len(rows):
        notes.append(f"answers compared as {'the official script' if mode == 'official' else 'LAVIS'} does")
    if by_labels:
        notes.append(f"{by_labels} of {len(rows)} questions scored by their labels: the file does not hold ten answers")
    if empty:  # answers that are rare in training are in no label of the Karpathy form, and VL-T5 scores such rows too
        notes.append(f"{empty} of {len(rows)} questions have an empty label, and count as wrong")
    return tuple(notes)

"""VQA accuracy, equal to that of two evaluation scripts, including their bugs.

The official one of VQA v2, and the copy of an older one in LAVIS (BLIP) and VL-T5, from which the published scores of
VL-BART come, in the DoRA paper too.
"""

from collections.abc import Sequence
from typing import Literal

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.readers.vqa_answers import NUM_ANSWERS, normalize_answer, strip_punctuation, tidy
from dora_mm.eval.vl.scores import AnswerScorer, VLScores, by_kind, check_answered, is_answered, percent

Mode = Literal["official", "lavis"]
LAVIS = "accuracy (lavis)"  # the name of the metric
RULES = {
    "accuracy": "VQA v2's vqaEval.py",
    LAVIS: "the older script in LAVIS: the published scores of VL-BART and BLIP",
}


def vqa_accuracy(prediction: str, raw_answers: Sequence[str], mode: Mode = "official") -> float:
    """Returns min(1, 0.3 n) for a prediction that n of ten annotators gave.

    This is the mean, over the ten, of min(1, matches among the other nine / 3).

    Args:
        prediction: The predicted answer.
        raw_answers: The ten answers, unchanged from the annotations.
        mode: "official" normalises prediction and answers, but neither where all ten agree: then "Yes" does not match
            "yes". "lavis" is the older script: predictions are always normalised, answers only lose punctuation, so
            that ten times "none", or "dont know" among other answers, is never matched.

    Raises:
        ValueError: There are not ten answers.
    """
    if len(raw_answers) != NUM_ANSWERS:
        raise ValueError(f"VQA accuracy is defined over ten answers, got {len(raw_answers)}")
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
    """Returns the score of the label that equals the prediction after normalisation, 0 where none does.

    For files with labels instead of the ten answers (the Karpathy format): the same as the official accuracy except
    where all ten agree or the file leaves rare answers out.

    Args:
        prediction: The predicted answer.
        answers: The labels.
        scores: The score of each label, 0 to 1.
    """
    normalized = normalize_answer(prediction)
    matching = (score for answer, score in zip(answers, scores, strict=True) if normalize_answer(answer) == normalized)
    return max(matching, default=0.0)


def row_accuracy(example: Example, prediction: str, mode: Mode = "official") -> float:
    """Returns the accuracy of one prediction, by the ten answers where the example has them, else by its labels.

    Raises:
        ValueError: The example has some answers, but not ten; the message names the question.
    """
    if not example.raw_answers:
        return label_accuracy(prediction, example.answers, example.scores)
    try:
        return vqa_accuracy(prediction, example.raw_answers, mode)
    except ValueError as error:
        raise ValueError(f"question {example.id}: {error}") from error


def score_vqa(predictions: Predictions) -> VLScores:
    """Computes `accuracy`, which is the official one, and `accuracy (lavis)`, where any question has ten answers.

    The tables by `answer_type` and `question_type` are of the official one.

    Args:
        predictions: Examples with their predicted answers.

    Raises:
        ValueError: There are no predictions, no example has answers, or one has raw answers, but not ten.
    """
    check_answered(predictions, every=False)
    values = [row_accuracy(example, prediction) for example, prediction in predictions]
    metrics = {"accuracy": percent(values)}
    if any(example.raw_answers for example, _ in predictions):
        metrics[LAVIS] = percent([row_accuracy(example, prediction, "lavis") for example, prediction in predictions])
    tables = by_kind(("answer_type", "question_type"), predictions, values)
    return VLScores("accuracy", metrics, tables, _notes(predictions), {name: RULES[name] for name in metrics})


def _notes(predictions: Predictions) -> tuple[str, ...]:
    by_labels = sum(not example.raw_answers for example, _ in predictions)
    empty = sum(not is_answered(example) for example, _ in predictions)
    notes = []
    if by_labels:
        notes.append(
            f"{by_labels} of {len(predictions)} questions scored by their labels: the file does not contain ten "
            "answers (for vqa_karpathy, `annotations` names one that does)"
        )
    if empty:  # labels of the Karpathy format omit answers that are rare in training; VL-T5 scores such rows too
        notes.append(f"{empty} of {len(predictions)} questions have an empty label, and count as wrong")
    return tuple(notes)


SCORER = AnswerScorer(score_vqa, row_accuracy)

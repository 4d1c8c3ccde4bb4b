"""The metrics of all vision-language tasks behind one function."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl import chat, choice, gqa, nlvr2, video, vqa
from dora_mm.eval.vl.captions import score_captions
from dora_mm.eval.vl.scores import VLScores, is_answered
from dora_mm.utils.tables import markdown_table

CAPTION_TASKS = ("caption", "tvc", "yc2c")
QUESTION_TASKS = ("vqa", "gqa", "nlvr2", "tvqa", "how2qa", "chat", "choice")


def main_metric(task: str) -> str:
    """Returns the name of the metric by which settings and checkpoints of a task are chosen; higher is better."""
    assert task in CAPTION_TASKS + QUESTION_TASKS, task
    return "CIDEr" if task in CAPTION_TASKS else "accuracy"


def score(task: str, predictions: Predictions, *, meteor: bool = True) -> VLScores:
    """Computes all metrics of one task, x 100.

    Args:
        task: One of CAPTION_TASKS or QUESTION_TASKS.
        predictions: Examples with predictions.
        meteor: Whether to compute METEOR, a caption metric that takes 5 seconds to load.

    Raises:
        ValueError: There are no predictions, or an example has no answers or answers that do not fit the task.
    """
    scorers: dict[str, Callable[[Predictions], VLScores]] = {
        "vqa": vqa.score_vqa,
        "gqa": gqa.score_gqa,
        "nlvr2": nlvr2.score_nlvr2,
        "caption": partial(score_captions, meteor=meteor),
        "chat": chat.score_chat,
        "choice": choice.score_choice,
        **{task: partial(video.score_video_questions, task) for task in ("tvqa", "how2qa")},
        **{task: partial(video.score_video_captions, task, meteor=meteor) for task in ("tvc", "yc2c")},
    }
    return scorers[task](predictions)


def score_all(predictions: Mapping[str, Predictions], *, meteor: bool = True) -> dict[str, VLScores]:
    """Computes the metrics of every task.

    Args:
        predictions: By task.
        meteor: Whether to compute METEOR.

    Raises:
        ValueError: The predictions of a task cannot be scored, see `score`.
    """
    return {task: score(task, found, meteor=meteor) for task, found in predictions.items()}


def score_row(task: str, example: Example, prediction: str) -> float | None:
    """Returns the accuracy of one prediction, 0 to 1; for VQA the official one.

    Returns:
        None for captions, which are only scored together, and for examples without answers.

    Raises:
        ValueError: The example has raw answers, but not ten.
    """
    if task in CAPTION_TASKS or not is_answered(example):
        return None
    scorers: dict[str, Any] = {"vqa": vqa, "gqa": gqa, "nlvr2": nlvr2, "chat": chat, "choice": choice}
    return scorers.get(task, video).row_accuracy(example, prediction)


def report(scores: VLScores) -> str:
    """Returns metrics, tables and notes as Markdown."""
    parts = [markdown_table([scores.task, "x 100"], [[name, f"{value:.2f}"] for name, value in scores.metrics.items()])]
    for heading, groups in scores.tables.items():
        cells = [[name, f"{value:.2f}", f"{count:,}"] for name, (value, count) in groups.items()]
        parts.append(markdown_table([heading, scores.main, "rows"], cells))
    if scores.notes:
        parts.append("\n".join(f"- {note}" for note in scores.notes))
    return "\n\n".join(parts)

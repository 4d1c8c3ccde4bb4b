"""The metrics of all vision-language tasks behind one function."""

from collections.abc import Callable, Mapping
from functools import partial

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl import gqa, nlvr2, video, vqa
from dora_mm.eval.vl.captions import score_captions
from dora_mm.eval.vl.scores import VLScores, is_answered
from dora_mm.utils.tables import markdown_table

CAPTION_TASKS = ("caption", "tvc", "yc2c")
QUESTION_TASKS = ("vqa", "gqa", "nlvr2", "tvqa", "how2qa")


def main_metric(task: str) -> str:
    """The name of the metric by which a task's settings and checkpoints are chosen; more is better."""
    assert task in CAPTION_TASKS + QUESTION_TASKS, task
    return "CIDEr" if task in CAPTION_TASKS else "accuracy"


def score(task: str, rows: Predictions, *, vqa_mode: vqa.Mode = "official", meteor: bool = True) -> VLScores:
    """All metrics of one task, x 100, from examples with predictions.

    Args:
        meteor: False leaves METEOR out of caption metrics, which takes 5 seconds to load.

    Raises:
        ValueError: no rows, a row without answers, or one whose answers are not of the task.
    """
    scorers: dict[str, Callable[[Predictions], VLScores]] = {
        "vqa": partial(vqa.score_vqa, mode=vqa_mode),
        "gqa": gqa.score_gqa,
        "nlvr2": nlvr2.score_nlvr2,
        "caption": partial(score_captions, meteor=meteor),
        **{task: partial(video.score_video_questions, task) for task in ("tvqa", "how2qa")},
        **{task: partial(video.score_video_captions, task, meteor=meteor) for task in ("tvc", "yc2c")},
    }
    return scorers[task](rows)


def score_all(predictions: Mapping[str, Predictions], *, meteor: bool = True) -> dict[str, VLScores]:
    """`score` of every task, by its name. Raises as `score`."""
    return {task: score(task, rows, meteor=meteor) for task, rows in predictions.items()}


def score_row(task: str, example: Example, prediction: str, *, vqa_mode: vqa.Mode = "official") -> float | None:
    """What one prediction is worth, 0 to 1; None for captions, which are only scored together, and without answers."""
    if task in CAPTION_TASKS or not is_answered(example):
        return None
    if task == "vqa":
        return vqa.row_accuracy(example, prediction, vqa_mode)
    return {"gqa": gqa, "nlvr2": nlvr2, "tvqa": video, "how2qa": video}[task].row_accuracy(example, prediction)


def report(scores: VLScores) -> str:
    """Markdown: the metrics, the tables, the notes."""
    parts = [markdown_table([scores.task, "x 100"], [[name, f"{value:.2f}"] for name, value in scores.metrics.items()])]
    for heading, rows in scores.tables.items():
        cells = [[name, f"{value:.2f}", f"{count:,}"] for name, (value, count) in rows.items()]
        parts.append(markdown_table([heading, scores.main, "rows"], cells))
    if scores.notes:
        parts.append("\n".join(f"- {note}" for note in scores.notes))
    return "\n\n".join(parts)

"""The metrics of all vision-language tasks behind one function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dora_mm.config.vl_tasks import TASKS
from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl import chat, choice, nlvr2, options, vqa
from dora_mm.eval.vl.captions import score_captions, split_scores
from dora_mm.eval.vl.gqa import score_gqa
from dora_mm.eval.vl.scores import VLScores, exact_match, is_answered
from dora_mm.eval.vl.video import score_clip_choices
from dora_mm.utils.tables import markdown_table


@dataclass(frozen=True)
class AnswerScorer:
    """Scores answers by their mean accuracy.

    Attributes:
        compute: All metrics of a split.
        accuracy: That of one prediction, 0 to 1.
        group: What rows have in common that are not independent, beside their images; None: nothing.
        grouping: What `group` joins, for notes.
    """

    compute: Callable[[Predictions], VLScores]
    accuracy: Callable[[Example, str], float]
    group: Callable[[Example], str | None] = lambda _: None
    grouping: str = ""

    def score(self, predictions: Predictions, *, meteor: bool) -> VLScores:
        """All metrics of a split, see `score`."""
        return self.compute(predictions)

    def row(self, example: Example, prediction: str) -> float | None:
        """The score of one prediction, see `score_row`."""
        return self.accuracy(example, prediction) if is_answered(example) else None

    def values(self, predictions: Predictions) -> np.ndarray:
        """Values (Q,) whose mean is the main metric / 100; empty where it could not be computed."""
        return np.array([self.row(example, prediction) or 0.0 for example, prediction in predictions])


@dataclass(frozen=True)
class CaptionScorer:
    """Scores captions, all of a split together, with the methods of `AnswerScorer`.

    Attributes:
        ascii_only: As in `score_captions`.
        group: As in `AnswerScorer`.
        grouping: As in `AnswerScorer`.
    """

    ascii_only: bool = False
    group: Callable[[Example], str | None] = lambda _: None
    grouping: str = ""

    def score(self, predictions: Predictions, *, meteor: bool) -> VLScores:
        return score_captions(predictions, ascii_only=self.ascii_only, meteor=meteor)

    def row(self, example: Example, prediction: str) -> float | None:
        return None

    def values(self, predictions: Predictions) -> np.ndarray:
        _, found = split_scores(predictions, ascii_only=self.ascii_only, meteor=False)
        return np.array(found.per_caption) / 100


SCORERS: dict[str, AnswerScorer | CaptionScorer] = {
    "vqa": AnswerScorer(vqa.score_vqa, vqa.row_accuracy),
    "gqa": AnswerScorer(score_gqa, exact_match),
    "nlvr2": AnswerScorer(nlvr2.score_nlvr2, nlvr2.row_accuracy, nlvr2.sentence_set, "all sentences of a set of NLVR2"),
    "captions": CaptionScorer(),
    "clip_choices": AnswerScorer(score_clip_choices, exact_match),
    "clip_captions": CaptionScorer(ascii_only=True),
    "conversations": AnswerScorer(chat.score_chat, chat.row_accuracy),
    "choices": AnswerScorer(choice.score_choice, choice.row_accuracy),
    "options": AnswerScorer(options.score_options, options.row_accuracy),
}


def scorer_of(task: str) -> AnswerScorer | CaptionScorer:
    """How the predictions of a task, by its name, are scored."""
    return SCORERS[TASKS[task].scorer]


def score(task: str, predictions: Predictions, *, meteor: bool = True) -> VLScores:
    """Computes all metrics of one task, x 100.

    Args:
        task: Name of the task.
        predictions: Examples with predictions.
        meteor: Whether to compute METEOR, a caption metric that takes 5 seconds to load.

    Raises:
        ValueError: There are no predictions, or an example has no answers or answers that do not fit the task.
    """
    return scorer_of(task).score(predictions, meteor=meteor)


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
    return scorer_of(task).row(example, prediction)


def report(task: str, scores: VLScores) -> str:
    """Returns metrics, tables and notes of a task as Markdown."""
    parts = [markdown_table([task, "x 100"], [[name, f"{value:.2f}"] for name, value in scores.metrics.items()])]
    for heading, groups in scores.tables.items():
        cells = [[name, f"{value:.2f}", f"{count:,}"] for name, (value, count) in groups.items()]
        parts.append(markdown_table([heading, scores.main, "rows"], cells))
    if scores.notes:
        parts.append("\n".join(f"- {note}" for note in scores.notes))
    return "\n\n".join(parts)


def task_table(scores: Mapping[str, VLScores]) -> str:
    """Returns the main metrics of several tasks as a Markdown table of one row, as papers print them.

    Args:
        scores: By task.

    Returns:
        The table, with the mean of the tasks where all have the same metric (one of accuracies and CIDEr, which may be
        above 100, is none of anything); empty where no task has a value.
    """
    values = {TASKS[task].title: found.value for task, found in scores.items() if found.value is not None}
    if not values:
        return ""
    if len({found.main for found in scores.values() if found.value is not None}) == 1:
        values["mean"] = sum(values.values()) / len(values)
    return markdown_table(list(values), [[f"{value:.1f}" for value in values.values()]])

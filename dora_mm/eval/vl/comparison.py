"""Methods beside each other on vision-language tasks, in the shape of the paper's Table 2, and paired differences.

Shapes: Q answers, S trainings, G groups of answers that go together. Scores are shares: 1 is 100 points.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.comparison import Variant, contrasts, differences_table
from dora_mm.eval.statistics import Interval, bootstrap, crossed
from dora_mm.eval.vl.captions import picture_scores
from dora_mm.eval.vl.metrics import CAPTION_TASKS, score_row
from dora_mm.eval.vl.video import clip_scores
from dora_mm.utils.tables import markdown_table

HEADINGS = {
    "vqa": "VQA",
    "gqa": "GQA",
    "nlvr2": "NLVR2",
    "caption": "CIDEr",
    "tvqa": "TVQA",
    "how2qa": "How2QA",
    "tvc": "TVC CIDEr",
    "yc2c": "YC2C CIDEr",
    "mean": "mean",
}
MEAN = "mean"


@dataclass(frozen=True)
class AnswerScores:
    """What the answers of one task are worth, each under every training. groups: (Q,), which of them go together."""

    values_QS: np.ndarray
    groups: tuple[str, ...]

    def minus(self, other: "AnswerScores") -> "AnswerScores":
        """Paired: the same answers, under the same trainings or under `other`'s only one."""
        assert self.groups == other.groups
        return AnswerScores(self.values_QS - other.values_QS, self.groups)


def answer_scores(task: str, answered: Sequence[Predictions]) -> AnswerScores | None:
    """The same examples with the answers of one training after the other; None where captions cannot be scored."""
    columns = [row_values(task, rows) for rows in answered]
    if not all(column.size for column in columns):
        return None
    groups = {example.id: group_of(task, example) for example, _ in answered[0]}  # once each, as captions are scored
    return AnswerScores(np.stack(columns, axis=1), tuple(groups.values()))


def row_values(task: str, rows: Predictions) -> np.ndarray:
    """(Q,), whose mean is the task's main metric / 100. Of captions CIDEr-D, none where it could not be computed."""
    if task in CAPTION_TASKS:
        _, found = (picture_scores if task == "caption" else clip_scores)(rows, meteor=False)
        return np.array(found.each) / 100
    return np.array([score_row(task, example, said) or 0.0 for example, said in rows])


def group_of(task: str, example: Example) -> str:
    """The picture or clip; of NLVR2 the set, whose sentences are about the same pairs of pictures."""
    if task == "nlvr2" and len(fields := example.id.split("-")) == 4:
        return "-".join(fields[:2])
    return " ".join(example.images)


def by_group(tasks: Sequence[AnswerScores]) -> np.ndarray:
    """(G, S) cells that vary as independent ones do: each training's mean over tasks, plus what a group adds to it.

    Their mean is the mean over tasks of the mean over answers, however many answers a group has: a ratio of two sums
    over groups, of which its first-order expansion is taken (as for samples of clusters).
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(group for task in tasks for group in task.groups))}
    added_GS = np.zeros((len(names), tasks[0].values_QS.shape[1]))
    for task in tasks:
        deviations_QS = (task.values_QS - task.values_QS.mean(axis=0)) / len(task.groups)
        np.add.at(added_GS, [names[group] for group in task.groups], deviations_QS)
    mean_S = np.mean([task.values_QS.mean(axis=0) for task in tasks], axis=0)
    return mean_S + added_GS * len(names) / len(tasks)


def intervals(scores: Mapping[str, AnswerScores], *, differences: bool = False) -> dict[str, Interval]:
    """95 % intervals by task, and of the `mean` of several: over groups, and over trainings where there are several.

    `differences`: the scores are paired ones. Between equal methods 1.5 to 6 % of the intervals of a difference exclude
    0 in 2,000 simulations each of 40 to 300 pictures with 3 to 8 questions and 3 trainings, 7 % with 2 trainings.
    """
    members = {task: [found] for task, found in scores.items()}
    if len(scores) > 1:
        members[MEAN] = list(scores.values())
    found = {}
    for key, tasks in members.items():
        bounded = key in scores and key not in CAPTION_TASKS
        bounds = (-np.inf, np.inf) if differences else (0.0, 1.0 if bounded else np.inf)
        cells_GS = by_group(tasks)
        found[key] = crossed(cells_GS, bounds=bounds) if cells_GS.shape[1] > 1 else _clipped(cells_GS, bounds)
    return found


def _clipped(cells_G1: np.ndarray, bounds: tuple[float, float]) -> Interval:
    found = bootstrap(cells_G1)
    return Interval(found.mean, max(found.low, bounds[0]), min(found.high, bounds[1]))


@dataclass(frozen=True)
class VLResult:
    """One line of the table; what does not apply to it, or could not be scored, is not there."""

    name: str
    scores: Mapping[str, Interval]
    parameters: int | None = None  # that train
    share: float | None = None  # of all parameters, in per cent
    rate: str = ""  # the learning rate; "*" behind it: the lowest or highest that was tried, so a better may lie beyond
    seconds_per_step: float | None = None
    memory_mb: float | None = None


def vl_results_table(results: Sequence[VLResult]) -> str:
    keys = _keys([result.scores for result in results])
    headings = ["", "trainable", "learning rate", *(HEADINGS[key] for key in keys), "seconds a step", "memory, MB"]
    rows = [
        [
            result.name,
            _or_nothing(result.share, "{:.2f} %"),
            result.rate,
            *(points(result.scores[key]) if key in result.scores else "" for key in keys),
            _or_nothing(result.seconds_per_step, "{:.3f}"),
            _or_nothing(result.memory_mb, "{:,.0f}"),
        ]
        for result in results
    ]
    return markdown_table(headings, rows)


def vl_results_csv(results: Sequence[VLResult]) -> str:
    """Scores x 100."""
    keys = _keys([result.scores for result in results])
    ends = [f"{key}_{end}" for key in keys for end in ("mean", "low", "high")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    cost = ["seconds_per_step", "peak_memory_mb"]
    writer.writerow(["name", "parameters", "trainable_share", "learning_rate", *ends, *cost])
    for result in results:
        found = [result.scores[key].as_dict() if key in result.scores else {} for key in keys]
        numbers = [f"{100 * one[end]:.3f}" if one else "" for one in found for end in ("mean", "low", "high")]
        known = [result.parameters or "", _or_nothing(result.share, "{:.4f}"), result.rate]
        took = [_or_nothing(result.seconds_per_step, "{:.4f}"), _or_nothing(result.memory_mb, "{:.0f}")]
        writer.writerow([result.name, *known, *numbers, *took])
    return file.getvalue()


def vl_contrasts_table(rank: int, scores: Mapping[Variant, Mapping[str, AnswerScores]]) -> str:
    """Paired differences over the same answers and trainings, in points."""
    found = {
        f"{first} - {second}": intervals(minus(scores[first], scores[second]), differences=True)
        for first, second in contrasts([rank])
    }
    keys = _keys(list(found.values()))
    return differences_table({key: HEADINGS[key] for key in keys}, found, lambda _, interval: points(interval))


def minus(first: Mapping[str, AnswerScores], second: Mapping[str, AnswerScores]) -> dict[str, AnswerScores]:
    """By task, where both have it."""
    return {task: found.minus(second[task]) for task, found in first.items() if task in second}


def gain_over_question_only(
    name: str, scores: Mapping[str, AnswerScores], question_only: Mapping[str, AnswerScores]
) -> str:
    """A sentence: by how much a method's answers are better than those that questions alone suggest."""
    found = intervals(minus(scores, question_only), differences=True)
    gained = ", ".join(f"{HEADINGS[task]} {points(found[task])}" for task in question_only)
    return f"{name}, less what questions alone give away (the answer that training gave most often): {gained} points."


def counted(scores: Mapping[str, AnswerScores]) -> str:
    """How much the scores are of."""
    parts = [
        f"{HEADINGS[task]} {len(found.groups):,} answers in {len(set(found.groups)):,} groups"
        for task, found in scores.items()
    ]
    return "; ".join(parts)


def points(interval: Interval) -> str:
    """ "65.8 (64.9 to 66.7)"."""
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _keys(scores: Sequence[Mapping[str, Interval]]) -> list[str]:
    """The tasks that any of them has, in the order of the headings."""
    return [key for key in HEADINGS if any(key in found for found in scores)]


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

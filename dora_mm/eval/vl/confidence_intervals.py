"""Scores of answers by task, their intervals over images and training runs, and paired differences.

Shapes: Q answers, S training runs, G groups of answers that are not independent. Scores are shares: 1 is 100 points.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.statistics import LEAST_GROUPS, ConfidenceInterval, groups_needed, mean_ci, share_ci
from dora_mm.eval.vl.metrics import scorer_of
from dora_mm.registries.vl_tasks import TASKS

MEAN = "mean"
TOO_FEW = f"no 95 % interval, which takes {LEAST_GROUPS} independent answers"


def heading(key: str) -> str:
    """The heading of a task in tables, or of the mean of several."""
    return MEAN if key == MEAN else TASKS[key].title


@dataclass(frozen=True)
class AnswerScores:
    """The score of each answer of one task in every training run."""

    values_QS: np.ndarray  # 0 to 1; CIDEr-D of captions can be higher
    groups: tuple[str, ...]  # (Q,), equal for answers that are not independent, see `group_of`

    def minus(self, other: "AnswerScores") -> "AnswerScores":
        """Returns paired differences.

        Args:
            other: Scores of the same answers, in the same runs or in a single one.
        """
        assert self.groups == other.groups
        return AnswerScores(self.values_QS - other.values_QS, self.groups)


def answer_scores(task: str, answered: Sequence[Predictions]) -> AnswerScores | None:
    """Scores the answers of one task.

    Args:
        task: The task.
        answered: Predictions of every training run for the same examples.

    Returns:
        The scores, or None where captions cannot be scored.
    """
    columns = [scorer_of(task).values(predictions) for predictions in answered]
    if not all(column.size for column in columns):
        return None
    return AnswerScores(np.stack(columns, axis=1), groups_of(task, [row for row, _ in answered[0]]))


def groups_of(task: str, examples: Iterable[Example]) -> tuple[str, ...]:
    """Returns the group of each value, (Q,): once per id, as captions are scored, or per question of several rows."""
    unit = scorer_of(task).unit
    return tuple({unit(example): group_of(task, example) for example in examples}.values())


def group_of(task: str, example: Example) -> str:
    """Returns what rows are grouped by: the task's scorer, their own group, or images or clip; else each is one."""
    return scorer_of(task).group(example) or example.group or " ".join(example.images) or f"row {example.id}"


def group_cells(tasks: Sequence[AnswerScores]) -> np.ndarray:
    """Returns one independent value per group and training run, (G, S): the run's mean score and the group's deviation.

    The mean of the cells is the mean over tasks of the mean over answers, whatever the number of answers in a group.
    That mean is a ratio of two sums over groups; the cells are its first-order expansion, as for cluster samples.

    Args:
        tasks: Scores in the same training runs. Tasks that share groups (images) vary together.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys(group for task in tasks for group in task.groups))}
    added_GS = np.zeros((len(names), tasks[0].values_QS.shape[1]))
    for task in tasks:
        deviations_QS = (task.values_QS - task.values_QS.mean(axis=0)) / len(task.groups)
        np.add.at(added_GS, [names[group] for group in task.groups], deviations_QS)
    mean_S = np.mean([task.values_QS.mean(axis=0) for task in tasks], axis=0)
    return mean_S + added_GS * len(names) / len(tasks)


def confidence_intervals(
    scores: Mapping[str, AnswerScores], *, differences: bool = False
) -> dict[str, ConfidenceInterval]:
    """Returns 95 % intervals of the mean score, over groups, and over training runs where there are several.

    Between equal methods 1.5 to 6 % of the intervals of a difference exclude 0 in 2,000 simulations each of 40 to 300
    images with 3 to 8 questions and 3 training runs, 7 % with 2 runs.

    Args:
        scores: By task.
        differences: Whether the scores are paired differences, which are not clipped to possible scores.

    Returns:
        Intervals by task, and of their mean under the key `mean`, where there are several and all have the same metric:
        one of accuracies and CIDEr, which may be above 100, is none of anything.
    """
    members = {task: [found] for task, found in scores.items()}
    if len(scores) > 1 and len({TASKS[task].kind == "captions" for task in scores}) == 1:
        members[MEAN] = list(scores.values())
    found = {}
    for key, tasks in members.items():
        cells_GS = group_cells(tasks)
        if differences:
            found[key] = mean_ci(cells_GS)
        elif TASKS[next(iter(scores)) if key == MEAN else key].kind == "captions":
            found[key] = mean_ci(cells_GS, bounds=(0.0, np.inf))
        else:
            found[key] = share_ci(cells_GS, least=variance_of_independent(tasks))
    return found


def variance_of_independent(tasks: Sequence[AnswerScores]) -> float:
    """The variance of the mean over tasks of the mean over answers, if all answers were independent."""
    variances = [task.values_QS.var() / max(task.values_QS.size - 1, 1) for task in tasks]
    return float(sum(variances)) / len(tasks) ** 2


def minus(first: Mapping[str, AnswerScores], second: Mapping[str, AnswerScores]) -> dict[str, AnswerScores]:
    """Returns paired differences first - second of the tasks that both have."""
    return {task: found.minus(second[task]) for task, found in first.items() if task in second}


def gain_over_question_only(
    name: str, scores: Mapping[str, AnswerScores], question_only: Mapping[str, AnswerScores]
) -> str:
    """Returns a sentence on how much better a method's answers are than those of the question-only baseline.

    Args:
        name: The name of the method.
        scores: Of the method, by task.
        question_only: Of the baseline (`question_only_answers`), by task.
    """
    found = confidence_intervals(minus(scores, question_only), differences=True)
    gained = ", ".join(f"{heading(task)} {points(found[task])}" for task in question_only)
    return f"{name}, minus the score without images (the most frequent answer of the training rows): {gained} points."


def points(ci: ConfidenceInterval, groups: int = LEAST_GROUPS) -> str:
    """Returns an interval in points, "65.8 (64.9 to 66.7)"; of fewer than LEAST_GROUPS groups the estimate alone."""
    return ci.text("{:.1f}", 100.0) if groups >= LEAST_GROUPS else f"{100 * ci.mean:.1f}"


def number_of(scores: AnswerScores) -> str:
    """Returns how many answers there are, and where some belong together how many groups they form."""
    answers, groups = len(scores.groups), len(set(scores.groups))
    grouped = f" in {groups:,} groups, each about one image, document or question"
    return f"n = {answers:,}{grouped if groups < answers else ''}"


def precision_notes(task: str, predictions: Predictions, main: str, wished: float | None = None) -> list[str]:
    """Returns sentences on how precisely a score is known: the 95 % interval of the main metric and of others, and n.

    Args:
        task: The task.
        predictions: Examples with predictions.
        main: The name of the main metric.
        wished: Half the width of the interval that is wished, in points; None: no number of answers is named.
    """
    scores, scorer = answer_scores(task, [predictions]), scorer_of(task)
    if scores is None:
        return []
    unit, answers, groups = scorer.unit, len(scores.groups), len(set(scores.groups))
    shown = points(confidence_intervals({task: scores})[task], groups)
    about = "95 % interval" if groups >= LEAST_GROUPS else TOO_FEW
    notes = [f"{main} {shown}: {about}; {number_of(scores)}"]
    group = {unit(example): group_of(task, example) for example, _ in predictions}
    others = scorer.confidence_intervals(
        scorer.filled(predictions), [group[unit(example)] for example, _ in predictions]
    )
    notes += [
        f"{name} {points(ci)}: 95 % interval" for name, ci in others.items() if ci.has_ends and groups >= LEAST_GROUPS
    ]
    needed = None if wished is None else groups_needed(group_cells([scores]), wished / 100)
    if needed is not None:
        more = f", in {needed:,} groups like these" if groups < answers else ""
        count = round(needed * answers / groups)
        notes.append(f"an interval of +- {wished:g} points takes about {count:,} answers{more}")
    return notes

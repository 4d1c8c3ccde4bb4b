"""The metrics of all vision-language tasks behind one function."""

from collections.abc import Mapping
from dataclasses import replace

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.statistics import LEAST_GROUPS
from dora_mm.eval.vl.captions import CaptionScorer
from dora_mm.eval.vl.scores import AnswerScorer, VLScores
from dora_mm.registries.scorers import SCORERS
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.tables import markdown_table

QUESTION_ONLY = "question-only accuracy"  # of answers that are guessed without any image
QUESTION_ONLY_RULE = "the most frequent answer of the training rows to the question, or to its first two words"


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
    return replace(scorer_of(task).score(predictions, meteor=meteor), num=len(predictions))


def score_all(predictions: Mapping[str, Predictions]) -> dict[str, VLScores]:
    """Computes the metrics of every task but METEOR, from predictions by task.

    Raises:
        ValueError: The predictions of a task cannot be scored, see `score`.
    """
    return {task: score(task, found, meteor=False) for task, found in predictions.items()}


def score_row(task: str, example: Example, prediction: str) -> float | None:
    """Returns the accuracy of one prediction, 0 to 1; for VQA the official one.

    Returns:
        None for captions, which are only scored together, and for examples without answers.

    Raises:
        ValueError: The example has raw answers, but not ten.
    """
    return scorer_of(task).row(example, prediction)


def report(task: str, scores: VLScores) -> str:
    """Returns metrics, with the rule of each and what it is a mean of, tables and notes of a task as Markdown."""
    columns = [task, "x 100", *(["rule"] if scores.rules else []), *(["n"] if scores.num else [])]
    rows = []
    for name, value in scores.metrics.items():
        rule = [scores.rules.get(name, "")] if scores.rules else []
        rows.append(
            [name, f"{value:.2f}", *rule, *([f"{scores.counts.get(name, scores.num):,}"] if scores.num else [])]
        )
    parts = [markdown_table(columns, rows)]
    for heading, groups in scores.tables.items():
        cells = [[name, f"{value:.2f}", f"{count:,}"] for name, (value, count) in groups.items()]
        parts.append(markdown_table([heading, scores.main, "rows"], cells))
    if scores.notes:
        parts.append("\n".join(f"- {note}" for note in scores.notes))
    return "\n\n".join(parts)


def conclusion(scores: Mapping[str, VLScores], num_groups: Mapping[str, int], *, adapted: bool) -> str:
    """The conclusion from the scores, with advice, in sentences.

    Args:
        scores: By task.
        num_groups: How many independent answers each task has; of a few nothing is concluded.
        adapted: Whether they are those of an adapter.
    """
    few = {task: number for task in scores if (number := num_groups[task]) < LEAST_GROUPS}
    cautions = [
        f"{TASKS[task].title}: {number} independent answer{'s are' if number > 1 else ' is'} too few to tell whether "
        f"the model is good ({LEAST_GROUPS} are needed, each about another image): give more validation rows."
        for task, number in few.items()
    ]
    guessing = [
        f"{TASKS[task].title}: {found.main} is not above {QUESTION_ONLY} ({guessed:.1f}), which needs no image: train "
        "longer or at another rate."
        for task, found in scores.items()
        if (guessed := found.metrics.get(QUESTION_ONLY)) is not None
        and (found.value or 0) <= guessed
        and task not in few
    ]
    if scores and all(TASKS[task].pairs for task in scores):
        other = "Both numbers already compare the adapter with the model without it."
    elif adapted:
        other = "To see what the adapter adds, compare with the same command and --set adapter=null."
    else:
        other = "These are the base model's: --set adapter=RUN scores a training on the same rows."
    return "\n".join([*cautions, *guessing, other])


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

"""Tables of campaigns: all methods with their scores, and paired differences, of images and of answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dora_mm.eval.images.scores import MEANS, Scores, format_ci, metric_cells
from dora_mm.eval.statistics import ConfidenceInterval, columns, holm, paired_difference
from dora_mm.eval.vl.confidence_intervals import MEAN, AnswerScores, confidence_intervals, heading, minus, points
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.studies.variants import Variant, contrasts
from dora_mm.utils.tables import csv_records, markdown_records, markdown_table

ScoresT = TypeVar("ScoresT")


LEAST = 0.05  # the p value below which a difference counts as one


@dataclass(frozen=True)
class Result:
    """A row of the table of all methods.

    Attributes:
        name: The name of the row.
        scores: Intervals by metric; cells of other metrics stay empty.
        rate: The learning rate, with "*" if it is the lowest or highest tried, so that a better one may lie beyond.
        summary: What the trainings say of themselves (see summary.json), such as `parameters`; empty: nothing trained.
    """

    name: str
    scores: Mapping[str, ConfidenceInterval]
    rate: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, key: str, form: str = "{}") -> str:
        """An entry of the summary as text, empty where there is none."""
        return form.format(self.summary[key]) if key in self.summary else ""

    def ends(self, key: str, form: str, scale: float = 1.0) -> dict[str, str]:
        """The mean, lower and upper end of a metric, empty where there is none, by their headings in a CSV file."""
        return {f"{key}_{end}": text for end, text in columns(self.scores.get(key), form, scale).items()}


def contrasts_table(
    ranks: Sequence[int],
    scores: Mapping[Variant, ScoresT],
    subtract: Callable[[ScoresT, ScoresT], Mapping[str, ConfidenceInterval]],
    headings: Mapping[str, str],
    show: Callable[[str, ConfidenceInterval], str],
) -> str:
    """Returns a Markdown table of paired differences, and notes how many intervals exclude 0.

    These are marked, and so are those that do by Holm's correction for all of the table.

    Args:
        ranks: The ranks that are compared.
        scores: Of every variant, of the same images or questions and the same seeds.
        subtract: Returns the difference of two scores by metric.
        headings: The heading of every metric; those that no difference has get no column.
        show: Formats the interval of a metric.
    """
    differences = {
        f"{first} - {second}": subtract(scores[first], scores[second]) for first, second in contrasts(ranks, scores)
    }
    keys = [key for key in headings if any(key in found for found in differences.values())]
    cells = [(name, key, found[key]) for name, found in differences.items() for key in keys]
    corrected = holm([ci.p for *_, ci in cells])
    marks = {
        (name, key): " !!" if p < LEAST else " !" if ci.excludes_zero else ""
        for (name, key, ci), p in zip(cells, corrected, strict=True)
    }
    rows = [[name, *(show(key, found[key]) + marks[name, key] for key in keys)] for name, found in differences.items()]
    note = (
        f"{sum(map(bool, marks.values()))} of {len(cells)} intervals exclude 0 (marked !; in simulations without a "
        f"difference 2 to 7 % do); after Holm's correction for their number, {sum(p < LEAST for p in corrected)} "
        "(marked !!)."
    )
    return markdown_table(["difference", *(headings[key] for key in keys)], rows) + f"\n\n{note}"


# --- of images ---------------------------------------------------------------------------------------------------


def image_results_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with a row per result and a column per metric."""
    return markdown_records(
        [
            {"": result.name, "parameters": result.entry("parameters", "{:,}"), "learning rate": result.rate}
            | {heading: _share(key, result.scores[key]) for key, (heading, _) in MEANS.items()}
            for result in results
        ]
    )


def image_results_csv(results: Sequence[Result]) -> str:
    """Returns the table as CSV, with columns for mean, lower and upper end of every metric."""
    records = []
    for result in results:
        record = {"name": result.name, "parameters": result.entry("parameters"), "learning_rate": result.rate}
        for key in MEANS:
            record |= result.ends(key, "{:.4f}")
        records.append(record)
    return csv_records(records)


def image_contrasts_table(ranks: Sequence[int], scores: Mapping[Variant, Scores], style: str) -> str:
    """Returns a Markdown table of paired differences, with intervals over concepts and training runs.

    Args:
        ranks: The ranks that are compared.
        scores: Of every variant, for the same concepts and seeds.
        style: The wanted class.
    """

    def subtract(first: Scores, second: Scores) -> dict[str, ConfidenceInterval]:
        ours, theirs = metric_cells(first, style), metric_cells(second, style)
        return {key: paired_difference(ours[key], theirs[key]) for key in ours}

    headings = {key: heading for key, (heading, _) in MEANS.items()}
    return contrasts_table(ranks, scores, subtract, headings, _share)


def _share(key: str, ci: ConfidenceInterval) -> str:
    return format_ci(ci, MEANS[key][1])


# --- of answers ----------------------------------------------------------------------------------------------------


def vl_results_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with a row per result and a column per task."""
    keys = _keys(results)
    return markdown_records(
        [
            {"": result.name, "trainable": result.entry("trainable_share", "{:.2f} %"), "learning rate": result.rate}
            | {heading(key): points(result.scores[key]) if key in result.scores else "" for key in keys}
            | {"seconds a step": result.entry("seconds_per_step", "{:.3f}")}
            | {"memory, MB": result.entry("peak_memory_mb", "{:,.0f}")}
            for result in results
        ]
    )


def vl_results_csv(results: Sequence[Result]) -> str:
    """Returns the table as CSV, with columns for mean, lower and upper end of every task, x 100."""
    keys, records = _keys(results), []
    for result in results:
        record = {"name": result.name, "parameters": result.entry("parameters")}
        record |= {"trainable_share": result.entry("trainable_share", "{:.4f}"), "learning_rate": result.rate}
        for key in keys:
            record |= result.ends(key, "{:.3f}", 100.0)
        record |= {"seconds_per_step": result.entry("seconds_per_step", "{:.4f}")}
        records.append(record | {"peak_memory_mb": result.entry("peak_memory_mb", "{:.0f}")})
    return csv_records(records)


def vl_contrasts_table(ranks: Sequence[int], scores: Mapping[Variant, Mapping[str, AnswerScores]]) -> str:
    """Returns a Markdown table of paired differences in points.

    Args:
        ranks: The ranks that are compared.
        scores: By variant and task, of the same answers and seeds.
    """
    return contrasts_table(
        ranks,
        scores,
        lambda first, second: confidence_intervals(minus(first, second), differences=True),
        {key: heading(key) for key in _ordered(key for found in scores.values() for key in (*found, MEAN))},
        lambda _, ci: points(ci),
    )


def describe_sizes(scores: Mapping[str, AnswerScores]) -> str:
    """Returns the number of answers and of groups of every task, in words."""
    parts = [
        f"{heading(task)} {len(found.groups):,} answers in {len(set(found.groups)):,} groups"
        for task, found in scores.items()
    ]
    return "; ".join(parts)


def caption_notes(scores: Mapping[str, AnswerScores], tasks: Iterable[str]) -> list[str]:
    """Returns notes on the scores of captions, and on those of `tasks` that have none."""
    notes = []
    if any(TASKS[task].kind == "captions" for task in scores):
        notes.append(
            "CIDEr is the mean of the captions' CIDEr-D scores, so its interval is computed in the same way; the word "
            "frequencies come from the references of the split, which are the same for all."
        )
    if missing := [heading(task) for task in tasks if task not in scores]:
        notes.append(
            f"Not scored: {', '.join(missing)}. The tokenizer of caption metrics, a Java program, cannot run here."
        )
    return notes


def _keys(results: Sequence[Result]) -> list[str]:
    """Returns the tasks that any of the results has scores of, in the order of TASKS."""
    return _ordered(key for result in results for key in result.scores)


def _ordered(keys: Iterable[str]) -> list[str]:
    order = {key: index for index, key in enumerate(TASKS)}
    return sorted(dict.fromkeys(keys), key=lambda key: (key == MEAN, order.get(key, len(order))))

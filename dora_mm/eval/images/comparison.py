"""Comparison of style adapters: the table of all methods, and paired differences with intervals."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_mm.eval.comparison import Variant, contrasts, differences_table
from dora_mm.eval.images.scores import METRICS, Scores, format_interval, metric_cells
from dora_mm.eval.statistics import Interval, paired_difference
from dora_mm.utils.tables import markdown_table


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    parameters: int | None  # number of trained parameters; None for the bare model
    rate: str  # the learning rate, with "*" if it is the lowest or highest tried, so that a better one may lie beyond
    metrics: Mapping[str, Interval]  # by the keys of METRICS


def results_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with a row per result and a column per metric."""
    headings = ["", "parameters", "learning rate", *(heading for heading, _ in METRICS.values())]
    rows = [
        [
            result.name,
            f"{result.parameters:,}" if result.parameters else "",
            result.rate,
            *(format_interval(result.metrics[key], share) for key, (_, share) in METRICS.items()),
        ]
        for result in results
    ]
    return markdown_table(headings, rows)


def results_csv(results: Sequence[Result]) -> str:
    """Returns the table as CSV, with columns for mean, lower and upper end of every metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ends = ("mean", "low", "high")
    writer.writerow(["name", "parameters", "learning_rate", *(f"{key}_{end}" for key in METRICS for end in ends)])
    for result in results:
        numbers = [f"{getattr(result.metrics[key], end):.4f}" for key in METRICS for end in ends]
        writer.writerow([result.name, result.parameters or "", result.rate, *numbers])
    return file.getvalue()


def contrasts_table(ranks: Sequence[int], scores: Mapping[Variant, Scores], style: str) -> str:
    """Returns a Markdown table of paired differences, with intervals over concepts and training runs.

    Args:
        ranks: The ranks that are compared.
        scores: Of every variant, for the same concepts and seeds.
        style: The wanted class.
    """
    differences = {}
    for first, second in contrasts(ranks, scores):
        ours, theirs = metric_cells(scores[first], style), metric_cells(scores[second], style)
        differences[f"{first} - {second}"] = {key: paired_difference(ours[key], theirs[key]) for key in ours}
    headings = {key: heading for key, (heading, _) in METRICS.items() if key != "frechet"}
    return differences_table(headings, differences, lambda key, interval: format_interval(interval, METRICS[key][1]))

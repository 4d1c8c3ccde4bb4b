"""Style adapters beside each other: the table of all methods, and paired differences with intervals."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_mm.eval.comparison import Variant, contrasts, differences_table
from dora_mm.eval.images.scores import METRICS, Scores, format_interval, metric_cells
from dora_mm.eval.statistics import Interval, difference
from dora_mm.utils.tables import markdown_table


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    parameters: int | None
    rate: str  # the learning rate; "*" behind it: the lowest or highest that was tried, so a better one may lie beyond
    metrics: Mapping[str, Interval]


def results_table(results: Sequence[Result]) -> str:
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
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ends = ("mean", "low", "high")
    writer.writerow(["name", "parameters", "learning_rate", *(f"{key}_{end}" for key in METRICS for end in ends)])
    for result in results:
        numbers = [f"{getattr(result.metrics[key], end):.4f}" for key in METRICS for end in ends]
        writer.writerow([result.name, result.parameters or "", result.rate, *numbers])
    return file.getvalue()


def contrasts_table(ranks: Sequence[int], scores: Mapping[Variant, Scores], style: str) -> str:
    """Paired differences over things and trainings, and what to make of them."""
    found = {}
    for first, second in contrasts(ranks):
        one, other = metric_cells(scores[first], style), metric_cells(scores[second], style)
        found[f"{first} - {second}"] = {key: difference(one[key], other[key]) for key in one}
    headings = {key: heading for key, (heading, _) in METRICS.items() if key != "frechet"}
    return differences_table(headings, found, lambda key, interval: format_interval(interval, METRICS[key][1]))

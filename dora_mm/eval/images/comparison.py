"""Comparison of style adapters: the table of all methods, and paired differences with intervals."""

from collections.abc import Mapping, Sequence

from dora_mm.eval import comparison
from dora_mm.eval.comparison import Result, Variant
from dora_mm.eval.images.scores import METRICS, Scores, format_interval, metric_cells
from dora_mm.eval.statistics import Interval, paired_difference
from dora_mm.utils.tables import csv_records, markdown_records


def results_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with a row per result and a column per metric."""
    return markdown_records(
        [
            {"": result.name, "parameters": result.entry("parameters", "{:,}"), "learning rate": result.rate}
            | {heading: _format(key, result.scores[key]) for key, (heading, _) in METRICS.items()}
            for result in results
        ]
    )


def results_csv(results: Sequence[Result]) -> str:
    """Returns the table as CSV, with columns for mean, lower and upper end of every metric."""
    records = []
    for result in results:
        record = {"name": result.name, "parameters": result.entry("parameters"), "learning_rate": result.rate}
        for key in METRICS:
            record |= result.ends(key, "{:.4f}".format)
        records.append(record)
    return csv_records(records)


def contrasts_table(ranks: Sequence[int], scores: Mapping[Variant, Scores], style: str) -> str:
    """Returns a Markdown table of paired differences, with intervals over concepts and training runs.

    Args:
        ranks: The ranks that are compared.
        scores: Of every variant, for the same concepts and seeds.
        style: The wanted class.
    """

    def subtract(first: Scores, second: Scores) -> dict[str, Interval]:
        ours, theirs = metric_cells(first, style), metric_cells(second, style)
        return {key: paired_difference(ours[key], theirs[key]) for key in ours}

    headings = {key: heading for key, (heading, _) in METRICS.items()}
    return comparison.contrasts_table(ranks, scores, subtract, headings, _format)


def _format(key: str, interval: Interval) -> str:
    return format_interval(interval, METRICS[key][1])

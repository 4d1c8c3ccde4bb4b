"""Methods beside each other: which settings are compared, the table of all, and paired differences with intervals."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dora_mm.eval.markdown import markdown_table
from dora_mm.eval.scores import METRICS, Scores, format_interval, metric_cells
from dora_mm.eval.statistics import Interval, difference

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class Variant:
    """One method at one rank; full fine-tuning has none."""

    method: str
    rank: int | None

    def __str__(self) -> str:
        return NAMES[self.method] + (f", rank {self.rank}" if self.rank else "")

    @property
    def key(self) -> str:
        return self.method + (f"-r{self.rank}" if self.rank else "")


FULL = Variant("full", None)


def variants(ranks: Sequence[int]) -> list[Variant]:
    """Everything that a comparison at these ranks needs, DoRA at their halves included (rank 1 has none)."""
    dora = sorted({*ranks, *(rank // 2 for rank in ranks if rank > 1)})
    return [FULL, *(Variant("lora", rank) for rank in sorted(ranks)), *(Variant("dora", rank) for rank in dora)]


def contrasts(ranks: Sequence[int]) -> list[tuple[Variant, Variant]]:
    """The pairs whose difference is reported."""
    pairs = []
    for rank in sorted(ranks):
        lora, dora = Variant("lora", rank), Variant("dora", rank)
        pairs.append((dora, lora))
        if rank > 1:
            pairs.append((Variant("dora", rank // 2), lora))
        pairs += [(dora, FULL), (lora, FULL)]
    return pairs


def table_rows(ranks: Sequence[int]) -> list[tuple[str, Variant]]:
    """The variants in the order of the table, by what they are called there."""
    rows = [(str(FULL), FULL)]
    for rank in sorted(ranks):
        rows += [(str(Variant(method, rank)), Variant(method, rank)) for method in ("lora", "dora")]
        if rank > 1:
            rows.append((f"DoRA, half of rank {rank}", Variant("dora", rank // 2)))
    return rows


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


def differences_table(
    headings: Mapping[str, str],
    differences: Mapping[str, Mapping[str, Interval]],
    show: Callable[[str, Interval], str],
) -> str:
    """Markdown: a row for each pair, a column for each key of `headings`; intervals without 0 are marked."""
    clear = 0

    def cell(key: str, found: Interval) -> str:
        nonlocal clear
        excludes_zero = found.low > 0 or found.high < 0
        clear += excludes_zero
        return show(key, found) + (" !" if excludes_zero else "")

    rows = [[name, *(cell(key, found[key]) for key in headings)] for name, found in differences.items()]
    note = (
        f"{clear} of {len(rows) * len(headings)} intervals exclude 0 (marked !). They are not corrected for their "
        "number: in simulations without a difference 2 to 7 % do."
    )
    return markdown_table(["difference", *headings.values()], rows) + f"\n\n{note}"

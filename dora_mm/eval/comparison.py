"""Comparison of methods: which variants are compared, the rows of the table, and the table of paired differences."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from dora_mm.eval.statistics import Interval
from dora_mm.utils.tables import markdown_table

NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class Variant:
    """A method at a rank; full fine-tuning has rank None. `str` is its name in tables, `key` its name in paths."""

    method: str
    rank: int | None

    def __str__(self) -> str:
        return NAMES[self.method] + (f", rank {self.rank}" if self.rank else "")

    @property
    def key(self) -> str:
        return self.method + (f"-r{self.rank}" if self.rank else "")


FULL = Variant("full", None)


def variants(ranks: Sequence[int], *, full: bool = True, half: bool = True) -> list[Variant]:
    """Returns all that a comparison at these ranks trains.

    Args:
        ranks: The ranks of LoRA and DoRA.
        full: Whether full fine-tuning is among them.
        half: Whether DoRA is trained at half of each rank, too (except rank 1).
    """
    dora = sorted({*ranks, *(rank // 2 for rank in ranks if half and rank > 1)})
    adapters = [*(Variant("lora", rank) for rank in sorted(ranks)), *(Variant("dora", rank) for rank in dora)]
    return [FULL, *adapters] if full else adapters


def contrasts(ranks: Sequence[int], trained: Container[Variant]) -> list[tuple[Variant, Variant]]:
    """Returns the pairs (first, second) of trained variants whose difference first - second is reported."""
    pairs = []
    for rank in sorted(ranks):
        lora, dora = Variant("lora", rank), Variant("dora", rank)
        pairs.append((dora, lora))
        if rank > 1:
            pairs.append((Variant("dora", rank // 2), lora))
        pairs += [(dora, FULL), (lora, FULL)]
    return [(first, second) for first, second in pairs if first in trained and second in trained]


def table_rows(ranks: Sequence[int], trained: Container[Variant]) -> list[tuple[str, Variant]]:
    """Returns (name in the table, variant) of the trained variants, in the order of the table."""
    rows = [(str(FULL), FULL)]
    for rank in sorted(ranks):
        rows += [(str(Variant(method, rank)), Variant(method, rank)) for method in ("lora", "dora")]
        if rank > 1:
            rows.append((f"DoRA, half of rank {rank}", Variant("dora", rank // 2)))
    return [(name, variant) for name, variant in rows if variant in trained]


def differences_table(
    headings: Mapping[str, str],
    differences: Mapping[str, Mapping[str, Interval]],
    show: Callable[[str, Interval], str],
) -> str:
    """Returns a Markdown table in which intervals that exclude 0 are marked, and a note that gives their number.

    Args:
        headings: Metric to heading: the columns.
        differences: Name of a pair to an interval for each of these metrics: the rows.
        show: Formats the interval of a metric.
    """
    num_marked = 0

    def cell(key: str, found: Interval) -> str:
        nonlocal num_marked
        excludes_zero = found.low > 0 or found.high < 0
        num_marked += excludes_zero
        return show(key, found) + (" !" if excludes_zero else "")

    rows = [[name, *(cell(key, found[key]) for key in headings)] for name, found in differences.items()]
    note = (
        f"{num_marked} of {len(rows) * len(headings)} intervals exclude 0 (marked !). They are not corrected for their "
        "number: in simulations without a difference 2 to 7 % do."
    )
    return markdown_table(["difference", *headings.values()], rows) + f"\n\n{note}"

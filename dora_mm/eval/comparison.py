"""Methods beside each other: which settings are compared, the table of all, and paired differences with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dora_mm.eval.statistics import Interval
from dora_mm.utils.tables import markdown_table

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

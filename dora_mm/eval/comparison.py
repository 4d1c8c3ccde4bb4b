"""Comparison of methods: which variants are compared, rows of their table, and the table of paired differences."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dora_mm.eval.statistics import Interval
from dora_mm.utils.tables import markdown_table

ScoresT = TypeVar("ScoresT")
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class Variant:
    """A method at a rank. `str` is its name in tables, `key` its name in paths.

    Attributes:
        method: The method.
        rank: The rank; None: of full fine-tuning.
        setting: The name of settings that differ from those of the plain method; empty: there are none.
    """

    method: str
    rank: int | None
    setting: str = ""

    def __str__(self) -> str:
        return ", ".join(
            [NAMES[self.method], *([f"rank {self.rank}"] if self.rank else []), *filter(None, [self.setting])]
        )

    @property
    def key(self) -> str:
        return "-".join([self.method, *([f"r{self.rank}"] if self.rank else []), *filter(None, [self.setting])])

    @property
    def plain(self) -> "Variant":
        """The method at this rank without further settings."""
        return Variant(self.method, self.rank)


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


def contrasts(ranks: Sequence[int], trained: Collection[Variant]) -> list[tuple[Variant, Variant]]:
    """Returns the pairs (first, second) of trained variants whose difference first - second is reported."""
    pairs = []
    for rank in sorted(ranks):
        lora, dora = Variant("lora", rank), Variant("dora", rank)
        pairs.append((dora, lora))
        if rank > 1:
            pairs.append((Variant("dora", rank // 2), lora))
        pairs += [(dora, FULL), (lora, FULL)]
    pairs += [(variant, variant.plain) for variant in trained if variant.setting]
    return [(first, second) for first, second in pairs if first in trained and second in trained]


def table_rows(ranks: Sequence[int], trained: Collection[Variant]) -> list[tuple[str, Variant]]:
    """Returns (name in the table, variant) of the trained variants, in the order of the table."""
    rows = [(str(FULL), FULL)]
    for rank in sorted(ranks):
        rows += [(str(Variant(method, rank)), Variant(method, rank)) for method in ("lora", "dora")]
        if rank > 1:
            rows.append((f"DoRA, half of rank {rank}", Variant("dora", rank // 2)))
    rows += [(str(variant), variant) for variant in trained if variant.setting]
    return [(name, variant) for name, variant in rows if variant in trained]


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
    scores: Mapping[str, Interval]
    rate: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, key: str, form: str = "{}") -> str:
        """An entry of the summary as text, empty where there is none."""
        return form.format(self.summary[key]) if key in self.summary else ""

    def ends(self, key: str, show: Callable[[float], str]) -> dict[str, str]:
        """The mean, lower and upper end of a metric, empty where there is none, by their headings in a CSV file."""
        found = self.scores.get(key)
        return {f"{key}_{end}": show(getattr(found, end)) if found else "" for end in ("mean", "low", "high")}


def contrasts_table(
    ranks: Sequence[int],
    scores: Mapping[Variant, ScoresT],
    subtract: Callable[[ScoresT, ScoresT], Mapping[str, Interval]],
    headings: Mapping[str, str],
    show: Callable[[str, Interval], str],
) -> str:
    """Returns a Markdown table of paired differences, which marks intervals that exclude 0 and notes their number.

    Args:
        ranks: The ranks that are compared.
        scores: Of every variant, of the same pictures or questions and the same seeds.
        subtract: Returns the difference of two scores by metric.
        headings: The heading of every metric; those that no difference has get no column.
        show: Formats the interval of a metric.
    """
    differences = {
        f"{first} - {second}": subtract(scores[first], scores[second]) for first, second in contrasts(ranks, scores)
    }
    keys = [key for key in headings if any(key in found for found in differences.values())]
    marked = [[found[key].low > 0 or found[key].high < 0 for key in keys] for found in differences.values()]
    rows = [
        [name, *(show(key, found[key]) + " !" * mark for key, mark in zip(keys, marks, strict=True))]
        for (name, found), marks in zip(differences.items(), marked, strict=True)
    ]
    num_marked = sum(map(sum, marked))
    note = (
        f"{num_marked} of {len(rows) * len(keys)} intervals exclude 0 (marked !). They are not corrected for their "
        "number: in simulations without a difference 2 to 7 % do."
    )
    return markdown_table(["difference", *(headings[key] for key in keys)], rows) + f"\n\n{note}"

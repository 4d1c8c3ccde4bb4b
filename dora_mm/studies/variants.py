"""Which variants of methods are compared, in which pairs, and in which rows of a table."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

NAMES = {
    **{"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "magnitude": "magnitudes alone"},
    **{"series": "bottlenecks in series", "parallel": "parallel bottlenecks", "prefix": "prefix"},
}


@dataclass(frozen=True)
class Variant:
    """A method at a rank. `str` is its name in tables, `key` its name in paths.

    Attributes:
        method: The method.
        rank: The rank; None: of full fine-tuning.
        setting: The name of settings that differ from those of the plain method, such as 150 steps; empty: none do.
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
        setting = self.setting.replace(" ", "_")
        return "-".join([self.method, *([f"r{self.rank}"] if self.rank else []), *filter(None, [setting])])

    @property
    def default(self) -> "Variant":
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
    pairs += [(variant, variant.default) for variant in trained if variant.setting]
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

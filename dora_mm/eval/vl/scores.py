"""What every vision-language metric yields: named numbers, tables by kind, and what must be said beside them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum

from dora_mm.data.vl.example import Example, Predictions

Table = dict[str, tuple[float, int]]  # kind -> mean (x 100) and number of rows


@dataclass(frozen=True)
class VLScores:
    """The scores of one task on one split. All shares are x 100, and so are caption metrics, as papers print them.

    main: the metric by which settings and checkpoints are chosen. metrics lacks what could not be computed, and then
    a note says why. tables: by heading, for instance `tables["answer_type"]["yes/no"]`.
    """

    task: str
    main: str
    metrics: dict[str, float]
    tables: dict[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """The main metric, None where it could not be computed."""
        return self.metrics.get(self.main)


def is_answered(example: Example) -> bool:
    return bool(example.answers or example.raw_answers)


def check_answered(rows: Predictions, *, every: bool = True) -> None:
    """Raises ValueError where there is nothing to compare with: no rows, or a row without answers, as in test splits.

    Args:
        every: False lets some rows be without, but not all.
    """
    if not rows:
        raise ValueError("there is nothing to score: the split has no rows")
    missing = [example.id for example, _ in rows if not is_answered(example)]
    if missing and (every or len(missing) == len(rows)):
        raise ValueError(f"{missing[0]} has no answers to compare with: of a test split, only write the predictions")


def percent(values: Sequence[float]) -> float:
    """The mean x 100."""
    return 100 * fsum(values) / len(values)


def by_kind(headings: Sequence[str], rows: Predictions, values: Sequence[float]) -> dict[str, Table]:
    """A table per heading, from the examples' kinds in that order. Predictions that have no kinds are in none."""
    grouped: dict[str, dict[str, list[float]]] = {heading: defaultdict(list) for heading in headings}
    for (example, _), value in zip(rows, values, strict=True):
        for heading, kind in zip(headings, example.kinds, strict=False):
            grouped[heading][kind].append(value)
    return {heading: table(groups) for heading, groups in grouped.items() if groups}


def table(groups: dict[str, list[float]]) -> Table:
    return {name: (percent(values), len(values)) for name, values in sorted(groups.items())}

"""Two predictions of the same rows: the paired difference with its interval and test, and the rows that changed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from dora_mm.data.vl.example import Predictions
from dora_mm.eval.statistics import LEAST_GROUPS, ConfidenceInterval, paired_p
from dora_mm.eval.vl.confidence_intervals import (
    TOO_FEW,
    answer_scores,
    confidence_intervals,
    group_cells,
    points,
)
from dora_mm.eval.vl.metrics import score_row
from dora_mm.utils.tables import markdown_table

MOST_SHOWN = 10  # rows


@dataclass(frozen=True)
class Change:
    """A row that the second answers with another score."""

    id: str
    before: str
    after: str
    scores: tuple[float, float]


@dataclass(frozen=True)
class PairedScores:
    """The paired difference of two predictions: the second minus the first.

    Attributes:
        difference: Of the main metric, a share.
        p: The chance of a difference as large where there is none.
        exact: Whether that is McNemar's exact test.
        num: How many values are compared, and in how many groups.
        kinds: The difference in points and the number of rows by kind of question.
        changes: The rows whose score changed.
    """

    difference: ConfidenceInterval
    p: float
    exact: bool
    num: tuple[int, int]
    kinds: dict[str, tuple[str, int]]
    changes: tuple[Change, ...]


def compared(task: str, first: Predictions, second: Predictions) -> PairedScores:
    """Compares two predictions of the same rows, in the same order.

    Raises:
        ValueError: The task's answers are not scored one by one.
    """
    ours, theirs = answer_scores(task, [first]), answer_scores(task, [second])
    if ours is None or theirs is None:
        raise ValueError(f"{task}: its answers could not be scored one by one, so that nothing can be compared")
    less = theirs.minus(ours)
    p, exact = paired_p(group_cells([less]))
    return PairedScores(
        confidence_intervals({task: less}, differences=True)[task],
        p,
        exact,
        (len(less.groups), len(set(less.groups))),
        _by_kind(task, first, second),
        tuple(_changes(task, first, second)),
    )


def _by_kind(task: str, first: Predictions, second: Predictions) -> dict[str, tuple[str, int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for number, (example, _) in enumerate(first):
        for kind in dict.fromkeys(example.kinds):
            rows[kind].append(number)
    found = {}
    for kind, numbers in sorted(rows.items()):
        ours, theirs = (answer_scores(task, [[side[n] for n in numbers]]) for side in (first, second))
        if ours is not None and theirs is not None:
            ci = confidence_intervals({task: theirs.minus(ours)}, differences=True)[task]
            found[kind] = (points(ci, len(set(ours.groups))), len(numbers))
    return found


def _changes(task: str, first: Predictions, second: Predictions) -> Iterator[Change]:
    for (example, before), (_, after) in zip(first, second, strict=True):
        was, now = score_row(task, example, before), score_row(task, example, after)
        if was is not None and now is not None and was != now:
            yield Change(example.id, before, after, (was, now))


def comparison_report(found: PairedScores, names: tuple[str, str]) -> str:
    """The comparison as Markdown."""
    better = sum(change.scores[1] > change.scores[0] for change in found.changes)
    answers, groups = found.num
    test = "McNemar's exact test" if found.exact else f"paired t test over {groups:,} groups"
    few = "" if groups >= LEAST_GROUPS else f"; {TOO_FEW}"
    parts = [
        f"{names[1]} - {names[0]}: {points(found.difference, groups)} points, p = {found.p:.2g} ({test}), "
        f"n = {answers:,}; {better:,} rows better, {len(found.changes) - better:,} worse{few}"
    ]
    if found.kinds:
        cells = [[kind, difference, f"{count:,}"] for kind, (difference, count) in found.kinds.items()]
        parts.append(markdown_table(["kind", "difference, points (95 %)", "rows"], cells))
    if found.changes:
        rows = [[c.id, _cell(c.before), _cell(c.after), f"{c.scores[0]:g} to {c.scores[1]:g}"] for c in found.changes]
        heading = (
            f"The first {MOST_SHOWN} of {len(found.changes):,} changed rows"
            if len(rows) > MOST_SHOWN
            else "Changed rows"
        )
        parts.append(f"{heading}:\n\n" + markdown_table(["id", names[0], names[1], "score"], rows[:MOST_SHOWN]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."

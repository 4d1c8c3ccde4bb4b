"""The loss of each image or row of a training for its page: sorted, and those marked whose loss stays apart."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dora_mm.eval.apart import apart, deviations
from dora_mm.utils.example_losses import ExampleLoss, read_losses
from dora_mm.utils.shell import quoted

MOST_NAMED = 8  # rows in a report
MOST_SHOWN = 60  # images or rows, those of the highest loss and all that are marked


def losses_by_example(path: Path, done: int, thumbnail: Callable[[ExampleLoss], str | None]) -> dict[str, Any]:
    """The data of a page: the steps of the measurements, the rows with the highest loss, and how many rows there are.

    Of each row it has the loss at each step, how far the last one is above the others in robust standard deviations,
    and why it is marked, if it is.

    Args:
        path: The run directory.
        done: The number of finished steps.
        thumbnail: The address of the image of a row; None: it cannot be shown.

    Raises:
        ValueError: A file of losses is not as a training wrote it.
    """
    measured = read_losses(path, done)
    if not measured:
        return {"steps": [], "rows": [], "count": 0}
    grouped = {step: _by_id(rows) for step, rows in measured.items()}
    values = {step: {name: _values(rows) for name, rows in found.items()} for step, found in grouped.items()}
    first = next(iter(values.values()))
    found = [deviations(None if number == 0 else first, each) for number, each in enumerate(values.values())]
    marks, last = apart(found), found[-1]
    ordered = sorted(last, key=lambda name: (name not in marks, -last[name].level))
    shown = ordered[: max(MOST_SHOWN, len(marks))]
    rows = []
    for name in shown:
        about = next(reversed(grouped.values()))[name]
        means = [fmean(each[name].values()) if name in each else None for each in values.values()]
        rows.append({
            "text": about[0].text, "answer": about[0].answer, "group": ", ".join(row.group for row in about),
            "name": Path(about[0].path).name, "file": thumbnail(about[0]), "losses": means,
            "level": last[name].level, "change": last[name].change, "mark": marks.get(name),
        })  # fmt: skip
    return {"steps": list(measured), "rows": rows, "count": len(ordered)}


def rows_apart(path: Path, done: int) -> list[str]:
    """Lines for the report of a training: the rows whose loss stays apart, and where all of them are shown."""
    found = losses_by_example(path, done, lambda row: None)
    if not found["rows"]:
        return []
    marked = [row for row in found["rows"] if row["mark"]]
    lines = [
        f"{row['mark']}: {row['text']!r}, right: {row['answer']!r}, loss {row['losses'][-1]:.3g}" for row in marked
    ]
    count = f"{len(marked)} of {found['count']} rows have losses that stay apart"
    return [f"\n{count}; dora-mm gallery {quoted(path)} shows the loss of each", *lines[:MOST_NAMED]]


def _by_id(rows: Sequence[ExampleLoss]) -> dict[str, list[ExampleLoss]]:
    found = defaultdict[str, list[ExampleLoss]](list)
    for row in rows:
        found[row.id].append(row)
    return found


def _values(rows: Sequence[ExampleLoss]) -> Mapping[tuple[str, int], float]:
    """The losses of an image by resolution and number of the time."""
    return {(row.group, number): loss for row in rows for number, loss in enumerate(row.losses)}

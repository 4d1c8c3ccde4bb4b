"""The lengths of rows before they are trained on: a sample of each task is encoded, and reported as quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dora_mm.data.vl.report import cheap_lengths
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl.vl_model import RowLengths, VLModel
from dora_mm.utils.tables import aligned_columns

SAMPLE = 100  # rows of a task, evenly spaced: a few seconds, as images are read
SMALLER = (
    "make the images smaller (model.max_pixels, model.image_size, model.max_tiles) or take fewer frames of videos "
    "(model.max_frames)"
)
QUANTILES = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99}


@dataclass(frozen=True)
class RowSample:
    """The lengths of some rows of a task.

    Attributes:
        total: The number of rows of its table.
        lengths: Of evenly spaced rows, and of those with the most characters and images.
        spaced: Which of these are evenly spaced (N,), bool.
    """

    total: int
    lengths: RowLengths
    spaced: np.ndarray

    @property
    def is_complete(self) -> bool:
        """Whether all rows were encoded that can be."""
        return len(self.lengths.rows) + len(self.lengths.bad) == self.total


def sample_lengths(model: VLModel, task: str, rows: TrainingSet) -> RowSample | None:
    """Encodes a sample of a task's rows, as many of the longest as a batch has among them.

    Returns:
        Their lengths; None for a family that has none to tell.
    """
    table = rows.table
    spaced = spaced_rows(len(table), SAMPLE)
    chosen = np.union1d(spaced, longest_rows(table, rows.batch_size))
    found = model.lengths(task, table, chosen.tolist(), rows.images)
    return None if found is None else RowSample(len(table), found, np.isin(found.rows, spaced))


def spaced_rows(total: int, count: int) -> np.ndarray:
    """At most `count` indices below `total`, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def longest_rows(table: ExampleTable, count: int) -> np.ndarray:
    """The rows of a table, by index, that have the most characters and images."""
    return np.argsort(-cheap_lengths(table), kind="stable")[:count]


def check_sample(table: ExampleTable, sample: RowSample) -> None:
    """Checks what was encoded of a table before it is trained on.

    Raises:
        ValueError: A row cannot be encoded and the table's `on_bad_data` is "stop", or none can; or most of the evenly
            spaced ones lose their whole answers, since their texts or images are too long.
    """
    lengths, lost = sample.lengths, sample.lengths.loses_answer[sample.spaced]
    if lengths.bad and (table.on_bad_data == "stop" or not len(lengths.rows)):
        index, reason = next(iter(lengths.bad.items()))
        where = f"{table.file}, id {table[index].id}: {reason}"
        raise ValueError(where if len(lengths.rows) else f"no row of {len(lengths.bad):,} can be encoded; {where}")
    if 2 * lost.sum() > len(lost):
        cure = "raise it, or shorten" if lengths.limit_from == "model.max_length" else "shorten"
        images = f", {SMALLER}" if lengths.image_tokens.any() else ""
        raise ValueError(
            f"{table.file}: {lost.sum():,} of {len(lost):,} rows that were looked at lose their whole answers, which "
            f"are beyond {lengths.limit:,} tokens ({lengths.limit_from}): {cure} the texts{images}"
        )


def row_lines(model: VLModel, sets: Mapping[str, TrainingSet]) -> str:
    """A line on the rows of every task of a training, of which a sample is encoded.

    Raises:
        ValueError: As `check_sample`.
    """
    lines = []
    for task, rows in sets.items():
        if (sample := sample_lengths(model, task, rows)) is not None:
            check_sample(rows.table, sample)
        lines.append(sample_line(task, rows.table, sample))
    return "\n".join(lines)


def sample_table(name: str, sample: RowSample) -> str:
    """A text table of the quantiles of the lengths, and sentences on rows that are too long."""
    lengths = sample.lengths
    number = f"all {sample.total:,} rows" if sample.is_complete else f"{len(lengths.rows):,} of {sample.total:,} rows"
    heading = f"lengths of {name} in tokens, {number} encoded"
    if not len(lengths.rows):
        return heading
    share = f"image tokens ({100 * _image_share(sample):.1f} % of all)"
    rows = [("whole rows", *_quantiles(lengths.tokens, sample.spaced))]
    rows += [(share, *_quantiles(lengths.image_tokens, sample.spaced))] if lengths.image_tokens.any() else []
    table = aligned_columns([(heading, *QUANTILES, "max"), *rows], num_text=1)
    how = f"min to 99 % are of {sample.spaced.sum():,} evenly spaced rows, max also of those with most text and images"
    return "\n".join([table, *([] if sample.is_complete else [how]), *remarks(lengths)])


def sample_line(name: str, table: ExampleTable, sample: RowSample | None) -> str:
    """One line on a table: its rows, the lengths of those that were encoded, and a sentence on those that are cut.

    Args:
        name: Which rows these are.
        table: All rows that are used.
        sample: The lengths of some of them; None: they have none to tell.
    """
    num_skipped = sum(map(len, table.skipped.values()))
    parts = [f"{name}: {len(table):,} rows" + (f" ({num_skipped:,} skipped)" if num_skipped else "")]
    if sample is not None and len(sample.lengths.rows):
        lengths = sample.lengths
        number = "" if sample.is_complete else f" of {len(lengths.rows):,} rows encoded"
        _, middle, _, high, longest = _quantiles(lengths.tokens, sample.spaced)
        share = f", {100 * _image_share(sample):.0f} % for images" if lengths.image_tokens.any() else ""
        parts.append(f"tokens{number}: 50 % {middle}, 99 % {high}, at most {longest}{share}")
        parts += remarks(lengths)
    return "; ".join(parts)


def remarks(lengths: RowLengths) -> list[str]:
    """Sentences on rows that are cut, and on those that cannot be encoded, if there are any."""
    cut, lost = int((lengths.tokens > lengths.limit).sum()), int(lengths.loses_answer.sum())
    total, sentences = len(lengths.rows) + len(lengths.bad), []
    if cut:
        details = []
        if exchanges := int(lengths.exchanges_cut.sum()):
            by_exchange, plural = int((lengths.exchanges_cut > 0).sum()), "s" if exchanges > 1 else ""
            details.append(f"{_lose(by_exchange)} {exchanges:,} whole exchange{plural} with the images")
        if lost:
            details.append(f"{_lose(lost)} the whole answer and {'is' if lost == 1 else 'are'} left out")
        fate = f" and {'is' if cut == 1 else 'are'} cut{': ' if details else ''}{', '.join(details)}"
        sentences.append(f"{_of(cut, total)} longer than {lengths.limit:,} tokens ({lengths.limit_from}){fate}")
    if bad := len(lengths.bad):
        verb = "is" if bad == 1 else "are"
        sentences.append(f"{bad:,} of {total:,} rows cannot be encoded, and {verb} left out")
    return sentences


def _of(number: int, total: int) -> str:
    return f"{number:,} of {total:,} rows {'is' if number == 1 else 'are'}"


def _lose(number: int) -> str:
    return f"{number:,} {'loses' if number == 1 else 'lose'}"


def _image_share(sample: RowSample) -> float:
    """The share of image tokens in all tokens of the evenly spaced rows."""
    lengths = sample.lengths
    return float(lengths.image_tokens[sample.spaced].sum() / max(1, lengths.tokens[sample.spaced].sum()))


def _quantiles(values: np.ndarray, spaced: np.ndarray) -> list[str]:
    """QUANTILES of the evenly spaced rows, and the highest value of all."""
    chosen = values[spaced] if spaced.any() else values
    found = [*np.quantile(chosen, list(QUANTILES.values()), method="nearest"), values.max()]
    return [f"{int(value):,}" for value in found]

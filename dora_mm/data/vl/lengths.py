"""The lengths of rows in tokens, and what to say about them before a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dora_mm.data.vl.tables import ExampleTable
from dora_mm.utils.tables import aligned_columns

QUANTILES = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True)
class RowLengths:
    """The lengths of rows of a table in tokens, before anything is cut.

    Attributes:
        rows: The rows of the table that were counted (N,).
        tokens: The tokens of each (N,).
        image_tokens: How many of these stand for images (N,).
        loses_answer: Whether nothing of the answers is left of a row whose text is cut (N,), bool.
        limit: The number of tokens that a row may have.
        limit_from: What sets it: a key of the config, or the model.
        source: How the tokens were counted.
        unreadable: Why the other rows cannot be encoded, by their index in the table, to follow a row's place.
    """

    rows: np.ndarray
    tokens: np.ndarray
    image_tokens: np.ndarray
    loses_answer: np.ndarray
    limit: int
    limit_from: str
    source: str
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @property
    def overflow(self) -> np.ndarray:
        """Whether the images of a row alone leave no token for its text (N,), bool."""
        return self.image_tokens >= self.limit

    @property
    def cut(self) -> np.ndarray:
        """Whether a row loses text (N,), bool."""
        return (self.tokens > self.limit) & ~self.overflow

    @property
    def trained(self) -> RowLengths:
        """The lengths of the rows that can be trained on."""
        kept = ~self.overflow
        arrays = ("rows", "tokens", "image_tokens", "loses_answer")
        return replace(self, **{name: getattr(self, name)[kept] for name in arrays})

    @property
    def image_share(self) -> float:
        """The share of image tokens in all tokens."""
        return float(self.image_tokens.sum() / max(1, self.tokens.sum()))

    @property
    def bad_rows(self) -> dict[int, str]:
        """The rows of the table that cannot be trained on, and why, to follow a row's place in a message."""
        reason = (
            f"has images that leave no room for text in {self.limit:,} tokens ({self.limit_from}): make them smaller "
            "(model.max_pixels, model.image_size), or raise model.max_length"
        )
        return {**self.unreadable, **dict.fromkeys(self.rows[self.overflow].tolist(), reason)}


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """At most `count` indices below `total`, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def length_table(name: str, lengths: RowLengths, total: int) -> str:
    """A text table of the quantiles of the lengths, and sentences on rows that are too long.

    Args:
        name: Which rows these are.
        lengths: Their lengths; rows whose images alone are too long are left out.
        total: The number of rows of the whole table that can be trained on.
    """
    lengths = lengths.trained
    counted = f"all {total:,} rows" if len(lengths.rows) == total else f"{len(lengths.rows):,} of {total:,} rows"
    heading = f"lengths of {name} in tokens, {counted}"
    if not len(lengths.rows):
        return heading
    share = f"of these for images ({100 * lengths.image_share:.1f} %)"
    rows = [("whole rows", *_quantiles(lengths.tokens))]
    rows += [(share, *_quantiles(lengths.image_tokens))] if lengths.image_tokens.any() else []
    table = aligned_columns([(heading, *QUANTILES), *rows], num_text=1)
    return "\n".join([table, f"counted: {lengths.source}", *remarks(lengths)])


def length_line(name: str, table: ExampleTable, lengths: RowLengths | None) -> str:
    """One line on a table: its rows, the lengths of those that were counted, and a sentence on those that are cut.

    Args:
        name: Which rows these are.
        table: All rows that are used.
        lengths: The lengths of some of them; None: they have none to tell.
    """
    num_skipped = sum(map(len, table.skipped.values()))
    parts = [f"{name}: {len(table):,} rows" + (f" ({num_skipped:,} skipped)" if num_skipped else "")]
    if lengths is not None and len((lengths := lengths.trained).rows):
        counted = "" if len(lengths.rows) == len(table) else f" of {len(lengths.rows):,} of them"
        _, middle, _, high, longest = _quantiles(lengths.tokens)
        share = f", {100 * lengths.image_share:.0f} % for images" if lengths.image_tokens.any() else ""
        parts.append(f"tokens{counted}: 50 % {middle}, 99 % {high}, at most {longest}{share}")
        parts += remarks(lengths)
    return "; ".join(parts)


def remarks(lengths: RowLengths) -> list[str]:
    """One sentence on rows that are cut, if there are any."""
    cut, lost, total = int(lengths.cut.sum()), int(lengths.loses_answer.sum()), len(lengths.rows)
    if not cut:
        return []
    sentence = (
        f"{_rows(cut)} of {total:,} ({100 * cut / total:.1f} %) {'is' if cut == 1 else 'are'} longer than "
        f"{lengths.limit:,} tokens ({lengths.limit_from}) and cut at the end"
    )
    if lost:
        whole = "loses its whole answer: nothing is learned from it" if lost == 1 else "lose their whole answers"
        sentence += f", and {_rows(lost)} {whole}"
    return [sentence]


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _quantiles(values: np.ndarray) -> list[str]:
    return [f"{int(v):,}" for v in np.quantile(values, list(QUANTILES.values()), method="nearest")]

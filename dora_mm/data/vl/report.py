"""A report of data sets before they are trained on: what was found, how long it is, and what was skipped."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.arrow import CONVERSATIONS
from dora_mm.data.vl.readers import format_name
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.utils.tables import aligned_columns

QUANTILES = (0.05, 0.5, 0.95, 1.0)
SKIPPED = "skipped: "
IMAGE = 1000  # characters that an image counts as where lengths are compared: 256 tokens, of some 4 each


def data_report(figures: Mapping[str, Mapping[str, str]]) -> str:
    """A text table with a column per data set and a row per figure.

    Args:
        figures: By the name of the data set, as "chat train": the figures by their labels. A set may lack some, or have
            others than those of `table_figures`, such as lengths in tokens.
    """
    labels = dict.fromkeys(label for found in figures.values() for label in found)
    rows = [[label, *(found.get(label, "") for found in figures.values())] for label in labels]
    return aligned_columns([["data", *figures], *rows], num_text=1)


def table_figures(source: SourceConfig, table: ExampleTable) -> dict[str, str]:
    """The figures of a table by their labels, without a look at any image.

    Args:
        source: The source of the table.
        table: All its rows that are used.

    Returns:
        Format, rows, images, turns and characters per row, and the number of skipped rows by reason.
    """
    images, turns = (per_row(table, lambda batch, key=key: _lengths(batch[key])) for key in ("images", "turns"))
    answers = per_row(table, lambda batch: _lengths(batch["answers"]))
    found = {
        "format": format_name(source),
        "rows": f"{len(table):,}",
        "rows without an answer": f"{np.sum(answers == 0):,}",
        "rows without an image": f"{np.sum(images == 0):,}",
        "images per row (lowest / median / highest)": _range(images),
    }
    if turns.any():
        found["turns per row (lowest / median / highest)"] = _range(turns)
        if empty := table.empty_answers():
            found["empty answers, not learned"] = f"{empty:,}"
    shares = " / ".join(f"{share:.0%}" for share in QUANTILES)
    found[f"characters per row ({shares})"] = quantiles(per_row(table, characters))
    return found | {f"{SKIPPED}{reason}": f"{len(locations):,}" for reason, locations in table.skipped.items()}


def learned_answers(table: ExampleTable) -> dict[str, str]:
    """How many rows of a training split have several answers, and which of them is learned; empty where none has."""
    several = table.lengths("answers") > 1
    first = several & (np.zeros(len(table), bool) if table.picked is None else table.picked == 0)
    numbers = {"the first": np.sum(first), "one drawn at each step": np.sum(several & ~first)}
    learned = [f"{how} of {number:,} rows" for how, number in numbers.items() if number]
    return {"learned of several answers (all are scored)": ", ".join(learned)} if learned else {}


def per_row(table: ExampleTable, values: Callable[[pa.RecordBatch], np.ndarray]) -> np.ndarray:
    """A number for each row of a table, from the columns of its record batches."""
    return np.concatenate([values(batch) for batch in table.batches])[table.rows]


def cheap_lengths(table: ExampleTable) -> np.ndarray:
    """A length of each row that is known without a look at its images: its characters, and IMAGE for each image."""
    return per_row(table, characters) + IMAGE * table.lengths("images")


def quantiles(values: np.ndarray) -> str:
    """QUANTILES of the values, rounded up to values that occur; empty if there are none."""
    if not len(values):
        return ""
    return " / ".join(f"{value:,.0f}" for value in np.quantile(values, QUANTILES, method="higher"))


def _range(values: np.ndarray) -> str:
    return f"{values.min():,} / {np.median(values):,.0f} / {values.max():,}" if len(values) else ""


def _lengths(column: Any) -> np.ndarray:  # a pyarrow.ListArray, which its stubs do not know
    return column.value_lengths().to_numpy()


def characters(batch: pa.RecordBatch) -> np.ndarray:
    """The characters of all turns, of a pair those of the longer conversation; of the text where there are none."""
    of_turns = np.maximum(*(_turn_lengths(batch[name]) for name in CONVERSATIONS))
    return np.where(_lengths(batch["turns"]) > 0, of_turns, _text_lengths(batch["text"]))


def _turn_lengths(turns: Any) -> np.ndarray:
    rows, lengths = turns.value_parent_indices().to_numpy(), _text_lengths(turns.flatten().field("text"))
    return np.bincount(rows, weights=lengths, minlength=len(turns)).astype(np.int64)


def _text_lengths(texts: pa.Array) -> np.ndarray:
    return pc.call_function("utf8_length", [texts]).to_numpy()

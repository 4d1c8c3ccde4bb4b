"""The Arrow form of examples: one column per attribute."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import accumulate, chain, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa

from dora_mm.data.vl.example import Example, Turn

TEXTS = pa.list_(pa.string())
TURN = pa.struct({"role": pa.string(), "text": pa.string(), "loss": pa.bool_(), "calls": pa.string()})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": TEXTS,
        "text": pa.string(),
        "answers": TEXTS,
        "scores": pa.list_(pa.float64()),
        "raw_answers": TEXTS,
        "kinds": TEXTS,
        "turns": pa.list_(TURN),
        "options": TEXTS,
        "frames": pa.list_(pa.int32()),
        "tools": pa.string(),
        "boxes": pa.string(),
        "rejected": pa.list_(TURN),
        "group": pa.string(),
    }
)
CONVERSATIONS = ("turns", "rejected")  # its columns of turns
assert SCHEMA.names == [column.name for column in fields(Example)]
assert tuple(column.name for column in TURN) == Turn._fields


def record_batch(rows: Sequence[Example]) -> pa.RecordBatch:
    """The rows in the columns of SCHEMA."""
    columns = [
        _turns([getattr(row, column.name) for row in rows])
        if column.name in CONVERSATIONS
        else pa.array([getattr(row, column.name) for row in rows], column.type)
        for column in SCHEMA
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def record_batches(rows: Iterable[Example], num_rows: int) -> Iterator[pa.RecordBatch]:
    """All rows in batches of `num_rows` rows each, the last possibly smaller."""
    remaining = iter(rows)
    while batch := [*islice(remaining, num_rows)]:
        yield record_batch(batch)


def _turns(conversations: Sequence[tuple[Turn, ...]]) -> pa.Array:
    """Built from flat columns: a dict for each turn would take ten times as long."""
    offsets = [*accumulate(map(len, conversations), initial=0)]
    turns = [*chain.from_iterable(conversations)]
    flat = [pa.array([*map(itemgetter(index), turns)], column.type) for index, column in enumerate(TURN)]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(flat, fields=list(TURN)))


def example_at(batch: pa.RecordBatch, row: int) -> Example:
    """The example in a row of a batch."""
    values: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
    turns: Any = {name: tuple(Turn(**turn) for turn in values.pop(name)) for name in CONVERSATIONS}
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Example(**{**values, **lists, **turns})

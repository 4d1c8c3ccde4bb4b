"""The Arrow form of examples: one column per attribute."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any

import pyarrow as pa

from dora_mm.data.vl.example import Example, Turn

Piece = Example | pa.RecordBatch  # one example, or many in the columns of SCHEMA
TEXTS = pa.list_(pa.string())
TURN = pa.struct({"role": pa.string(), "text": pa.string(), "loss": pa.bool_()})
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
    }
)
assert SCHEMA.names == [column.name for column in fields(Example)]
assert tuple(column.name for column in TURN) == Turn._fields


def record_batch(rows: Sequence[Example]) -> pa.RecordBatch:
    """The rows in the columns of SCHEMA."""
    columns = [
        _turns([row.turns for row in rows])
        if column.name == "turns"
        else pa.array([getattr(row, column.name) for row in rows], column.type)
        for column in SCHEMA
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def selected(pieces: Iterable[Piece], start: int, end: int | None) -> Iterator[Piece]:
    """The examples from `start` up to `end`, None: all; no more are read than these."""
    position = 0
    for piece in pieces:
        size = 1 if isinstance(piece, Example) else piece.num_rows
        first, last = max(start - position, 0), size if end is None else min(end - position, size)
        if first < last:
            yield piece if isinstance(piece, Example) else piece.slice(first, last - first)
        position += size
        if end is not None and position >= end:
            return


def record_batches(pieces: Iterable[Piece], num_rows: int) -> Iterator[pa.RecordBatch]:
    """All examples in batches of `num_rows` rows each, the last possibly smaller."""
    rest: list[pa.RecordBatch] = []
    for batch in _batches(pieces, num_rows):
        rest.append(batch)
        if sum(part.num_rows for part in rest) >= num_rows:
            *complete, last = pa.Table.from_batches(rest).combine_chunks().to_batches(max_chunksize=num_rows)
            yield from complete
            rest = [last]
    if rest:
        yield from pa.Table.from_batches(rest).combine_chunks().to_batches()


def _batches(pieces: Iterable[Piece], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The record batches among the pieces, and batches of the examples between them."""
    rows: list[Example] = []
    for piece in pieces:
        if isinstance(piece, Example):
            rows.append(piece)
        if rows and (len(rows) == num_rows or not isinstance(piece, Example)):
            yield record_batch(rows)
            rows = []
        if not isinstance(piece, Example):
            yield piece
    if rows:
        yield record_batch(rows)


def _turns(conversations: Sequence[tuple[Turn, ...]]) -> pa.Array:
    """Built from flat columns: a dict for each turn would take ten times as long."""
    offsets = [*accumulate(map(len, conversations), initial=0)]
    turns = [*chain.from_iterable(conversations)]
    flat = [pa.array([*map(itemgetter(index), turns)], column.type) for index, column in enumerate(TURN)]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(flat, fields=list(TURN)))


def example_at(batch: pa.RecordBatch, row: int) -> Example:
    """The example in a row of a batch."""
    values: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
    turns = tuple(Turn(**turn) for turn in values.pop("turns"))
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Example(**{**values, **lists}, turns=turns)

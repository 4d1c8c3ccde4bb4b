"""Reads files of conversations piece by piece: by column where all rows of a piece are plain, else row by row.

The rows of a JSON list mostly start alike, `{"id":`, as the program that wrote them did not change its mind. So a piece
can be cut where such a start is, without parsing it first. Whether that was right shows when the piece is parsed.
"""

import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from pydantic_core import from_json

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.arrow import SCHEMA
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item
from dora_mm.data.vl.readers.chat import examples, file_items, find_shape, kind_of_file, new_id, read_chat
from dora_mm.data.vl.readers.chat_columns import plain_rows
from dora_mm.data.vl.readers.chat_shapes import Keys
from dora_mm.data.vl.rows import BadRows, RowError

log = logging.getLogger(__name__)
WORDS = {"list": "item", "lines": "line"}
PIECE = 1 << 22  # bytes that are read at a time
LONGEST = 1 << 26  # bytes of a row that is waited for
BLANK = b" \t\r\n"
FIRST_KEY = re.compile(rb'[ \t\r\n]*\[[ \t\r\n]*(\{[ \t\r\n]*"[^"\\\n]*"[ \t\r\n]*:)')


class Rows(NamedTuple):
    """Many rows of a file.

    Attributes:
        text: The rows, after a line break each but for the first.
        start: What each row starts with, "" for lines.
        number: How many rows there are; of JSON lines, blank ones count too.
    """

    text: bytes
    start: bytes
    number: int

    def split(self) -> list[bytes]:
        """The single rows."""
        return [self.start + row for row in self.text.removeprefix(self.start).split(b"\n" + self.start)]


def read_chat_in_pieces(source: SourceConfig, bad: BadRows) -> Iterator[Example | pa.RecordBatch]:
    """Reads what `read_chat` reads, in the same order, many rows at once where that is possible.

    Yields:
        Examples, and record batches of examples.

    Raises:
        ValueError: As `read_chat`.
    """
    path = Path(source.file)
    shape, kind = find_shape(path), kind_of_file(path)
    if shape.keys is None or kind == "parquet":
        yield from read_chat(source, bad)
        return
    log.info("%s: %s", path, shape.name)
    seen: set[str] = set()
    number = 0  # of rows so far
    with path.open("rb") as file:
        for rows in list_pieces(file) if kind == "list" else line_pieces(file):
            batch = None if rows is None else _batch(rows, shape.keys, kind, number, seen)
            items = None if rows is None or batch is not None else _items(rows, kind, number)
            if batch is not None:
                yield batch
            elif items is not None:
                yield from examples(path, shape, items, seen, bad)
            if rows is None or (batch is None and items is None):  # ijson reads the rest, or says what is wrong
                yield from examples(path, shape, islice(file_items(path), number, None), seen, bad)
                return
            number += rows.number


def _batch(rows: Rows, keys: Keys, kind: str, number: int, seen: set[str]) -> pa.RecordBatch | None:
    """The examples of the rows, if all are plain; their ids are added to `seen`."""
    found = plain_rows(rows.text, keys, on_lines=rows.text.count(b"\n") < rows.number)
    if found is None or found[0].num_rows != rows.number:
        return None
    batch, given = found
    names: list[str] = []
    try:
        for place, name in enumerate(given, number + 1):
            names.append(new_id(name, f"{WORDS[kind]} {place}", seen))
            seen.add(names[-1])
    except RowError:
        seen.difference_update(names)
        return None
    return pa.RecordBatch.from_arrays([pa.array(names, pa.string()), *batch.columns[1:]], schema=SCHEMA)


def _items(rows: Rows, kind: str, number: int) -> list[Item] | None:
    """The rows with their places: parsed if they were in a list, and then None if one is not valid."""
    found = [(f"{WORDS[kind]} {place}", row) for place, row in enumerate(rows.split(), number + 1)]
    if kind == "lines":
        return [(where, line) for where, line in found if line.strip()]
    try:
        return [(where, from_json(row, cache_strings="keys")) for where, row in found]
    except ValueError:
        return None


def line_pieces(file: BinaryIO) -> Iterator[Rows]:
    """The lines of a file, many at a time."""
    rest = b""
    while more := file.read(PIECE):
        lines, end, rest = (rest + more).rpartition(b"\n")
        if end:
            yield Rows(lines, b"", lines.count(b"\n") + 1)
    if rest:
        yield Rows(rest, b"", 1)


def list_pieces(file: BinaryIO) -> Iterator[Rows | None]:
    """The objects of a list, many at a time; None, at the end, if the rest is not such a list."""
    buffer = file.read(PIECE)
    match = FIRST_KEY.match(buffer)
    first_key = match.group(1) if match else b""
    buffer = buffer[match.start(1) :] if match else buffer
    while match:
        more = file.read(PIECE)
        end = buffer.rfind(first_key, 1) if more else len(buffer)
        if end < 0 and len(buffer) < LONGEST:
            buffer += more
            continue
        tail = buffer[max(end - 1000, 0) : end]
        last = end - len(tail) + len(tail.rstrip(BLANK)) - 1
        if end < 0 or buffer[last : last + 1] != (b"," if more else b"]"):
            break
        rows = _without_commas(buffer[:last], first_key)
        if rows is None:
            break
        yield rows
        if not more:
            return
        buffer = buffer[end:] + more
    yield None


def _without_commas(text: bytes, start: bytes) -> Rows | None:
    """Objects with a line break between them instead of a comma and white space; None if some have one already."""
    second = text.find(start, 1)
    if second < 0:
        return Rows(text, start, 1)
    between = text[len(text[:second].rstrip(BLANK)) - 1 : second]
    with_break = text.count(b"\n" + start) if b"\n" in text else 0
    separated = text.replace(between + start, b"\n" + start)
    saved = len(between) - 1  # bytes of each separator; counting them takes longer
    number = (len(text) - len(separated)) // saved if saved else separated.count(b"\n" + start)
    if with_break not in (0, number) or (with_break and not between.endswith(b"\n")):
        return None
    return Rows(separated, start, number + 1)

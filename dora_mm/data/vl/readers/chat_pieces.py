"""Reads files of conversations piece by piece: by column where all rows of a piece are plain, else row by row.

The rows of a JSON list mostly start alike, `{"id":`, as the program that wrote them did not change its mind. So a piece
can be cut where such a start is, without parsing it first. Whether that was right shows when the piece is parsed.
"""

import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pydantic_core import from_json

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.arrow import SCHEMA
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item
from dora_mm.data.vl.readers.chat import examples, file_items, find_shape, kind_of_file, new_id, read_chat
from dora_mm.data.vl.readers.chat_columns import Keys, plain_rows
from dora_mm.data.vl.readers.chat_shapes import read_conversations, read_messages
from dora_mm.data.vl.rows import BadRows, RowError

log = logging.getLogger(__name__)
KEYS = {
    read_conversations: Keys("conversations", "from", "value"),
    read_messages: Keys("messages", "role", "content"),
}
WORDS = {"list": "item", "lines": "line"}
PIECE = 1 << 22  # bytes that are read at a time
LONGEST = 1 << 26  # bytes of a row that is waited for
BLANK = b" \t\r\n"
FIRST_KEY = re.compile(rb'[ \t\r\n]*\[[ \t\r\n]*(\{[ \t\r\n]*"[^"\\\n]*"[ \t\r\n]*:)')


def read_chat_in_pieces(source: SourceConfig, bad: BadRows) -> Iterator[Example | pa.RecordBatch]:
    """Reads what `read_chat` reads, in the same order, many rows at once where that is possible.

    Yields:
        Examples, and record batches of examples.

    Raises:
        ValueError: As `read_chat`.
    """
    path = Path(source.file)
    shape, kind = find_shape(path), kind_of_file(path)
    if shape.read not in KEYS or kind == "parquet":
        yield from read_chat(source, bad)
        return
    log.info("%s: %s", path, shape.name)
    seen: set[str] = set()
    number = 0  # of rows, or lines, so far
    with path.open("rb") as file:
        for lines in list_pieces(file) if kind == "list" else line_pieces(file):
            batch = None if lines is None else _batch(lines, KEYS[shape.read], kind, number, seen)
            items = None if lines is None or batch is not None else _items(lines, kind, number)
            if batch is not None:
                yield batch
            elif items is not None:
                yield from examples(path, shape, items, seen, bad)
            if lines is None or (batch is None and items is None):  # ijson reads the rest, or says what is wrong
                yield from examples(path, shape, islice(file_items(path), number, None), seen, bad)
                return
            number += lines.count(b"\n") + 1


def _batch(lines: bytes, keys: Keys, kind: str, number: int, seen: set[str]) -> pa.RecordBatch | None:
    """The lines as examples, if all are plain rows; their ids are added to `seen`."""
    found = plain_rows(lines, keys)
    if found is None or found[0].num_rows != lines.count(b"\n") + 1:  # blank lines count, too
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
    return batch.set_column(0, SCHEMA.field(0), pa.array(names, pa.string()))


def _items(lines: bytes, kind: str, number: int) -> list[Item] | None:
    """The lines with their places: parsed if they were a list, and then None if they are no objects."""
    found = [(f"{WORDS[kind]} {place}", line) for place, line in enumerate(lines.split(b"\n"), number + 1)]
    if kind == "lines":
        return [(where, line) for where, line in found if line.strip()]
    try:
        return [(where, from_json(line, allow_inf_nan=False, cache_strings="keys")) for where, line in found]
    except ValueError:
        return None


def line_pieces(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, many at a time, without the last line break."""
    rest = b""
    while more := file.read(PIECE):
        lines, end, rest = (rest + more).rpartition(b"\n")
        if end:
            yield lines
    if rest:
        yield rest


def list_pieces(file: BinaryIO) -> Iterator[bytes | None]:
    """The objects of a list, each on a line, many at a time; None, at the end, if the rest is not such a list."""
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
        yield _on_lines(buffer[:last], first_key)
        if not more:
            return
        buffer = buffer[end:] + more
    yield None


def _on_lines(piece: bytes, first_key: bytes) -> bytes:
    """The objects of a piece, each on a line. JSON has line breaks only as white space."""
    if b"\n" in piece or b"\r" in piece:
        piece, first_key = (text.replace(b"\n", b" ").replace(b"\r", b" ") for text in (piece, first_key))
    second = piece.find(first_key, 1)
    if second < 0:
        return piece
    comma = len(piece[:second].rstrip(BLANK)) - 1
    return piece.replace(piece[comma:second] + first_key, b"\n" + first_key)

"""Conversations about images, in the files of LLaVA, LLaMA-Factory, ms-swift, Hugging Face (TRL) and axolotl.

A file is a JSON list, JSON lines or Parquet; its content says which. All its rows have one shape, see chat_shapes.py.
"""

import logging
from collections.abc import Container, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, check_encoding, json_lines, list_items, place
from dora_mm.data.vl.readers.chat_shapes import SHAPES, JsonRow, Shape, shape_of
from dora_mm.data.vl.readers.conversation import conversation
from dora_mm.data.vl.rows import BadRows, RowError
from dora_mm.utils.messages import first_line

log = logging.getLogger(__name__)
PEEKED = 20  # rows that are searched for one of a known shape: the first may be damaged
PARQUET_ROWS = 64  # of a Parquet file in memory at a time, with their images


def read_chat(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every conversation of a file.

    A row has as many IMAGE markers, or image items, as images, and keeps them where they are. (LLaVA's own loader moves
    each to the start of its turn.) Only where a row has images and no marker at all, all markers come first in the
    user's first turn, as ms-swift and TRL do; LLaVA's loader would leave such images unused.

    A row that ends with the user's turn has no answer. Rows without `id` are named by their number in the file, and an
    id that occurs again, as in LLaVA's own files, by its place as well.

    Raises:
        ValueError: The file cannot be read or has no known shape, or a row is bad and `bad` is set to "stop".
    """
    path = Path(source.file)
    shape = find_shape(path)
    log.info("%s: %s", path, shape.name)
    seen: set[str] = set()
    for where, item in file_items(path):
        try:
            row = _parsed(item)
            example = conversation(shape.read(row), _new_id(row.get("id"), where, seen))
        except RowError as error:
            bad.add(place(path, where, item), str(error))
        else:
            seen.add(example.id)
            yield example


def find_shape(path: Path) -> Shape:
    """The shape of a file's rows.

    Raises:
        ValueError: The file cannot be read, or its first rows have none of the known shapes.
    """
    keys = "is damaged or not an object"
    for number, (_, item) in enumerate(islice(file_items(path), PEEKED)):
        with suppress(RowError):  # reported when the row is read
            row = _parsed(item)
            if shape := shape_of(row):
                return shape
            if number == 0:
                keys = f"has the keys {', '.join(map(repr, row))}"
    known = ", ".join(shape.name for shape in SHAPES)
    raise ValueError(f"{path} has no known shape of conversations: its first row {keys}; known are {known}")


def file_items(path: Path) -> Iterator[Item]:
    """The rows of a file with their places; those of JSON lines are not parsed yet.

    Raises:
        ValueError: The file cannot be read; or, while iterating, it is damaged or has no rows.
    """
    return {"list": list_items, "lines": json_lines, "parquet": _parquet_rows}[kind_of_file(path)](path)


def kind_of_file(path: Path) -> Literal["list", "lines", "parquet"]:
    """What a file is by its first bytes.

    Raises:
        ValueError: It cannot be read, or is UTF-16.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    check_encoding(path, start)
    start = start.lstrip(b" \t\r\n\xef\xbb\xbf")
    return "parquet" if start.startswith(b"PAR1") else "list" if start.startswith(b"[") else "lines"


def _parquet_rows(path: Path) -> Iterator[Item]:
    """The rows of a Parquet file, a few at a time.

    Raises:
        ValueError: While iterating: the file is damaged or has no rows.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(PARQUET_ROWS) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        after = f" after row {number}, the last complete row" if number else ""
        raise ValueError(f"{path} is truncated or not a valid Parquet file{after} ({first_line(error)})") from None
    if not number:
        raise ValueError(f"{path} has no rows")


def _parsed(item: Any) -> JsonRow:
    """The item as an object; lines are parsed."""
    if isinstance(item, bytes):
        try:
            item = from_json(item, cache_strings="keys")
        except ValueError:
            raise RowError("is truncated or not valid JSON") from None
    if not isinstance(item, dict):
        raise RowError("is not an object with keys")
    return item


def _new_id(given: Any, where: str, seen: Container[str]) -> str:
    """The id of the file, or the number of the row; with its place where the file has the id a second time.

    Raises:
        RowError: The id is no id, or this one exists as well.
    """
    if given is None or given == "":
        name = where.rpartition(" ")[2]
    elif type(given) in (int, str):
        name = str(given)
    else:
        raise RowError("has an id that is neither a number nor a text")
    if name not in seen:
        return name
    if (placed := f"{name} ({where})") in seen:
        raise RowError("has a duplicate id")
    return placed

"""Conversations about images, in the files of LLaVA, LLaMA-Factory, ms-swift, Hugging Face (TRL) and axolotl.

A file is a JSON list or JSON lines, which may be packed by gzip, or Parquet; its content says which. All its rows have
one shape, see chat_shapes.py. A folder or a pattern names several files.
"""

import gzip
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, check_encoding, json_lines, list_items, open_data, place
from dora_mm.data.vl.readers.chat_shapes import SHAPES, JsonRow, Shape, shape_of
from dora_mm.data.vl.readers.conversation import conversation
from dora_mm.data.vl.rows import BadRows, RowError
from dora_mm.utils.messages import first_line

log = logging.getLogger(__name__)
PEEKED = 20  # rows that are searched for one of a known shape: the first may be damaged
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")  # of files in a folder
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
    seen: set[str] = set()
    paths = [path for given in source.files for path in files_of(Path(given))]
    for number, path in enumerate(paths, 1):
        shape = find_shape(path, source.columns)
        log.info("%s: %s", path, shape.name)
        yield from _file_rows(path, shape, source.columns, seen, bad, f"file {number}, " if number > 1 else "")


def _file_rows(
    path: Path, shape: Shape, columns: Mapping[Any, str], seen: set[str], bad: BadRows, file: str
) -> Iterator[Example]:
    """The conversations of one file; the ids in `seen` are taken, and `file` tells its places from those of others."""
    for where, item in file_items(path):
        try:
            row = _renamed(_parsed(item), columns)
            example = conversation(shape.read(row), _new_id(row.get("id"), f"{file}{where}", seen))
        except RowError as error:
            bad.add(place(path, where, item), str(error))
        else:
            seen.add(example.id)
            yield example


def files_of(path: Path) -> list[Path]:
    """The files that a path names: itself, those of a folder and its subfolders, or those that fit a pattern.

    Raises:
        ValueError: A folder has no data files.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        return sorted(map(Path, glob(str(path), recursive=True))) or [path]
    found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES) and file.is_file())
    if not found:
        raise ValueError(f"{path} is a folder without files that end in {', '.join(SUFFIXES)}")
    return found


def find_shape(path: Path, columns: Mapping[Any, str] | None = None) -> Shape:
    """The shape of a file's rows.

    Args:
        path: The file.
        columns: The names of its columns, by the names that they have here.

    Raises:
        ValueError: The file cannot be read, or its first rows have none of the known shapes.
    """
    keys = "is damaged or not an object"
    for number, (_, item) in enumerate(islice(file_items(path), PEEKED)):
        with suppress(RowError):  # reported when the row is read
            row = _renamed(given := _parsed(item), columns or {})
            if shape := shape_of(row):
                return shape
            if number == 0:
                keys = f"has the keys {', '.join(map(repr, given))}"
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
        with open_data(path) as file:
            start = file.read(1 << 16)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is truncated or not a valid gzip file") from None
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


def _renamed(row: JsonRow, columns: Mapping[Any, str]) -> JsonRow:
    """The row with the names that its columns have here; those whose names others take are left out."""
    if not columns:
        return row
    taken = {*columns, *columns.values()}
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {name: row[column] for name, column in columns.items() if column in row}


def _new_id(given: Any, where: str, seen: set[str]) -> str:
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

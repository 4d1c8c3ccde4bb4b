"""Rows of files by the names that their columns have here, and the columns that a config names."""

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from dora_mm.data.vl.readers.chat_shapes import JsonRow
from dora_mm.data.vl.readers.file_rows import COLUMNAR, file_items, kind_of_file
from dora_mm.data.vl.readers.hub_files import METADATA
from dora_mm.data.vl.rows import RowError

EQUAL = (*COLUMNAR, "table", "sheet")  # kinds of files whose rows all have the same columns
IGNORED = "none"  # in place of the name of a column: the one that has our name is not read
SAMPLE = 100  # rows of a file that say which columns it has
# Keys whose values a table has as text, in JSON or as Python writes it
LISTS = frozenset(("messages", "conversations", "texts", "prompt", "completion", "history", "tools", "objects")).union(
    ("image", "images", "video", "videos")
)
# Keys whose values are texts, or turns as text
TURNS = frozenset(("chosen", "rejected", "rejected_response", "rejected_messages"))
PACKED = LISTS | TURNS


def named_row(path: Path, item: Any, columns: Mapping[Any, str]) -> JsonRow:
    """A row of a file, by the names that its columns have here."""
    row = _renamed(with_files(path, parsed_row(item)), columns)
    packed = {
        key: _listed(text)
        for key in PACKED & row.keys()
        if isinstance(text := row[key], str) and text.lstrip()[:1] in ("[", "{")
    }
    packed = {key: found for key, found in packed.items() if key in LISTS or _are_turns(found)}
    return row | packed if packed else row


def _are_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(
        isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in turns
    )


def with_files(path: Path, row: JsonRow) -> JsonRow:
    """A row; of metadata with the images that it names, by `file_name` or `file_names`, beside its file."""
    if path.name not in METADATA:
        return row
    found: JsonRow = {}
    for key, value in row.items():
        many = key.endswith("file_names")
        if value is None or not (many or key.endswith("file_name")):
            found[key] = value
            continue
        name = key.removesuffix("file_names" if many else "file_name").removesuffix("_")
        names = _listed(value) if many and isinstance(value, str) else value
        found[name or ("images" if many else "image")] = (
            [_next_to(path, one) for one in names] if isinstance(names, list) else _next_to(path, names)
        )
    return found


def _next_to(path: Path, name: Any) -> str:
    """The path of a file by its name in the metadata beside it."""
    if not isinstance(name, str) or "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise RowError("has a `file_name` that is not the name of a file beside the metadata or below it")
    return str(path.parent.absolute() / name)


def _listed(text: str) -> Any:
    """The list or the object in a text, in JSON or as Python writes it; another text as it is."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def parsed_row(item: Any) -> JsonRow:
    """The item as an object; lines are parsed."""
    if isinstance(item, RowError):
        raise item
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


# --- the columns of files ---------------------------------------------------------------------------------------------


def rows_by_column(path: Path, number: int | None = None) -> Iterable[JsonRow]:
    """The first rows of a file by the names of its columns, without those that are no objects; None: all rows."""
    for _, item in islice(file_items(path), number):
        with suppress(RowError):  # reported when the row is read
            yield with_files(path, parsed_row(item))


def check_columns(files: Sequence[Path], columns: Mapping[Any, str]) -> None:
    """Checks that the columns that a config names are there.

    Args:
        files: The files of a source. A column is in some rows of one of them, at least.
        columns: The names of columns, by the names that they have here.

    Raises:
        ValueError: There is no such column, or a file cannot be read.
    """
    missing = set(columns.values()) - {IGNORED}
    for path in files:
        if not missing:
            return
        for row in rows_by_column(path, SAMPLE if kind_of_file(path) in EQUAL else None):
            missing -= row.keys()
            if not missing:
                return
    if missing:
        named = next(f"{name}: {column}" for name, column in columns.items() if column in missing)
        there = dict.fromkeys(name for path in files for row in rows_by_column(path, SAMPLE) for name in row)
        raise ValueError(f"{files[0]} has no column for columns: {{{named}}}: it has {', '.join(there)}")

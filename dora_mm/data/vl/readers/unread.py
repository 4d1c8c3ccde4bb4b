"""The columns of one's own data that have texts or images and are not read.

Of conversations, captions, preferences and tables of questions; other formats have published layouts.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.readers.cells import table_lines
from dora_mm.data.vl.readers.chat_shapes import CAPTIONS, COMMON, SHAPES, UNREAD, JsonRow, shape_of
from dora_mm.data.vl.readers.choices import KINDS
from dora_mm.data.vl.readers.hub_files import files_of_source
from dora_mm.data.vl.readers.hub_rows import is_of_hub
from dora_mm.data.vl.readers.named_rows import IGNORED, SAMPLE, named_row, rows_by_column
from dora_mm.data.vl.readers.preferences import ANSWERS, OF_REJECTED
from dora_mm.data.vl.rows import RowError
from dora_mm.registries.vl_tasks import TASKS

OF_PAIRS = COMMON.union(ANSWERS, OF_REJECTED, *(shape.keys for shape in SHAPES))
TABLES = ("choices", "answers")  # formats of VLMEvalKit's tables
OF_TABLES = frozenset((*ascii_uppercase, "index", "question", "hint", "answer", "image", "image_path", *KINDS))
SHOWN = 40  # characters of an example
TWO_COLUMNS = "columns: {instruction: A, input: B, output: C} for a question in two columns A and B"


def unread_columns(source: SourceConfig) -> dict[str, str]:
    """The columns of a source that have texts or images and are not read, each with the first of its texts.

    The first rows of each file tell. A column that has the value of one that is read is none of them.

    Args:
        source: A source with existing paths, of a format of one's own data; there are none of published layouts.

    Raises:
        ValueError: A file cannot be read.
    """
    if is_of_hub(source):
        return {}
    if source.format in TABLES:
        return _unread_of_table(source.path)
    if "columns" not in source.reader.keys:
        return {}
    pairs = any(task.pairs for task in TASKS.values() if source.format in task.formats)
    found: dict[str, str] = {}
    for path in files_of_source(source):
        for row in rows_by_column(path, SAMPLE):
            for column in _unread(row, _keys_of(path, row, source.columns, pairs=pairs), source.columns):
                found.setdefault(column, _first_text(row[column]))
    return found


def _unread_of_table(path: Path) -> dict[str, str]:
    """The columns of a table of questions that have texts and are not read."""
    (_, header), *lines = islice(table_lines(path, tabs=True, start=0), SAMPLE + 1)
    found: dict[str, str] = {}
    for _, cells in lines:
        for name, cell in zip(header, cells, strict=False):
            if name not in OF_TABLES and cell.strip():
                found.setdefault(name, _first_text(cell))
    return found


def about_unread(columns: Mapping[str, str]) -> str:
    """The columns with their texts, and how they would be read."""
    shown = ", ".join(f"{name} ({text!r})" if text else name for name, text in columns.items())
    suggested = ", ".join(f"{ours}: {name}" for name in columns if (ours := _name_within(name)))
    example = f" as in columns: {{{suggested}}};" if suggested else ""
    return f"{shown}; to read them, say what each is,{example} {TWO_COLUMNS}"


def _keys_of(path: Path, row: JsonRow, columns: Mapping[Any, str], *, pairs: bool) -> frozenset[str]:
    """The keys of a row, by our names, that are read."""
    if pairs:
        return OF_PAIRS
    try:
        named = named_row(path, row, columns)
    except RowError:  # reported when the row is read
        return COMMON.union(*(shape.keys for shape in SHAPES))
    if (shape := shape_of(named)) is None:
        return COMMON
    keys = shape.keys - {"caption"} if shape is CAPTIONS and named.get("text") is not None else shape.keys
    return keys | COMMON


def _unread(row: JsonRow, keys: frozenset[str], columns: Mapping[Any, str]) -> list[str]:
    """The columns of a row that have texts or images and are neither read under their own names nor under ours."""
    own = {key for key in keys if key not in columns} - set(columns.values())
    read = own.union(columns[key] for key in keys if key in columns)
    values = [row[name] for name in read if name in row]
    values += [member for value in values if isinstance(value, list) for member in value]
    known = read | (UNREAD.keys() - columns.keys())  # the latter are refused
    known |= {name for name, column in columns.items() if column == IGNORED}
    others = {name: value for name, value in row.items() if name not in known and _has_content(value)}
    return [name for name, value in others.items() if value not in values and not _is_within(value, row)]


def _is_within(value: Any, row: JsonRow) -> bool:
    """Whether a value is an object whose members are columns themselves, as the JSON of an archive."""
    return isinstance(value, dict) and all(key in row and row[key] == member for key, member in value.items())


def _has_content(value: Any) -> bool:
    """Whether there is a text or an image in a value."""
    if isinstance(value, str | bytes):
        return bool(value.strip())
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_content, members))


def _first_text(value: Any) -> str:
    """The beginning of a text, or of the first one in a list; "" for what is none."""
    value = next((member for member in value if _has_content(member)), "") if isinstance(value, list) else value
    text = " ".join(value[: 4 * SHOWN].split()) if isinstance(value, str) else ""
    return f"{text[: SHOWN - 3]}..." if len(text) > SHOWN else text


def _name_within(column: str) -> str:
    """Our name that the name of a column begins with, the longest; "" if none does."""
    names = COMMON.union(*(shape.keys for shape in SHAPES)) - {"id"}
    return max((name for name in names if column.lower().startswith(name)), key=len, default="")

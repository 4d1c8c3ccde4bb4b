"""Benchmarks as the hub holds them: Parquet or Arrow files with the columns of a repository, and images inside.

A format of official files reads these, too: what a file is, its first bytes say. hub_layouts.py has the columns.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, location
from dora_mm.data.vl.readers.chat import new_id
from dora_mm.data.vl.readers.chat_shapes import JsonRow
from dora_mm.data.vl.readers.file_rows import COLUMNAR, file_items, kind_of_file
from dora_mm.data.vl.readers.hub_files import files_of_source
from dora_mm.data.vl.readers.hub_layouts import LAYOUTS, HubColumns
from dora_mm.data.vl.readers.named_rows import parsed_row
from dora_mm.data.vl.rows import BadRows, RowError
from dora_mm.registries.readers import ANY, READERS

PEEKED = 20  # rows that are searched for a layout: the first may be damaged
NO_TEXT = ("Parquet", "Arrow", "sheet", "tar", "zip")  # kinds of files
OTHERS = {"JSON": (*NO_TEXT, "table"), "a table with tabs": (*NO_TEXT, "list"), "a pickle": NO_TEXT, ANY: ()}
TITLES = {"sheet": "an Excel file", "tar": "a tar archive", "zip": "a zip archive", "table": "a table"}
TITLES |= {"Parquet": "Parquet", "Arrow": "Arrow", "list": "JSON"}


def is_of_hub(source: SourceConfig) -> bool:
    """Whether the files of a source have the columns of a repository, and are not those of the format's own reader.

    Raises:
        ValueError: A file is of a kind that the format does not read, or there are several where it reads one.
    """
    reader = source.reader
    if source.columns or (reader.official == ANY and not reader.hub):
        return False
    files = files_of_source(source) if reader.hub else [source.path]
    kinds = {kind_of_file(path): path for path in files if path.is_file()}
    if reader.hub and kinds.keys() <= {*COLUMNAR}:
        return reader.official != ANY or find_layout(source.format, files[0]) is not None
    for kind, path in kinds.items():
        if kind in OTHERS[reader.official]:
            raise ValueError(f"{path} is {TITLES[kind]}; {reads(source.format)}")
    if len(files) > 1 and reader.official != ANY:
        raise ValueError(f"{source.title} names {len(files)} files that are not Parquet; {reads(source.format)}")
    return False


def reads(form: str) -> str:
    """What a format reads, for messages."""
    reader, found = READERS[form], f"{form} reads"
    if reader.official != ANY:
        found += f" {reader.official} ({reader.published})"
    layouts = [f"the columns {', '.join(layout.columns)} ({layout.repository})" for layout in LAYOUTS.get(form, ())]
    if layouts:
        found += f"{' or' if reader.official != ANY else ''} Parquet with {', or '.join(layouts)}"
    return found


def find_layout(form: str, path: Path) -> HubColumns | None:
    """The layout of a file by its columns, None if it has those of none."""
    rows = (_parsed(item) for _, item in islice(file_items(path), PEEKED))
    return next((layout for row in rows for layout in LAYOUTS[form] if layout.fits(row)), None)


def _parsed(item: Any) -> JsonRow:
    with suppress(RowError):  # reported when the row is read
        return parsed_row(item)
    return {}


def read_hub_rows(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every row of files with the columns of a repository.

    Rows without ids are named by their number, from 0, and an id that occurs again by its place as well.

    Raises:
        ValueError: A file is damaged or has other columns, or a row is bad and `bad` is set to "stop".
    """
    seen: set[str] = set()
    number = 0
    for file, path in enumerate(files_of_source(source), 1):
        if (layout := find_layout(source.format, path)) is None:
            columns = dict.fromkeys(name for _, item in islice(file_items(path), PEEKED) for name in _parsed(item))
            raise ValueError(f"{path} has the columns {', '.join(columns)}; {reads(source.format)}")
        for where, item in _selected(source, path):
            try:
                row = parsed_row(item)
                examples = [*layout.make(layout, row)]
                for example in examples:
                    name = new_id(layout.id_of(row, number), f"{where} of file {file}" if file > 1 else where, seen)
                    seen.add(name)
                    yield replace(example, id=name)
            except RowError as error:
                bad.add(location(path, where, item), str(error))
            number += 1


def _selected(source: SourceConfig, path: Path) -> Iterator[Item]:
    """The rows of a file, or those of the split where a column says it: of folders, `split` chooses among files."""
    split = source.split if source.reader.splits_rows and str(path) in source.files else None
    splits = set()
    for where, item in file_items(path):
        own = _parsed(item).get("split") if split else None
        splits.add(str(own))
        if own == split:
            yield where, item
    if split and split not in splits:
        raise ValueError(f"{path} has no rows of the split {split!r}: it has {', '.join(sorted(splits))}")

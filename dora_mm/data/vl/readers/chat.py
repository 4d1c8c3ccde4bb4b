"""Conversations about images, in the files of LLaVA, LLaMA-Factory, ms-swift, Hugging Face (TRL) and axolotl.

Of what kind a file is, its content says, see file_rows.py; of a folder or a pattern those of one split are read, see
hub_files.py. All rows of a file have one shape, see chat_shapes.py.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import location
from dora_mm.data.vl.readers.chat_shapes import CAPTIONS, SHAPES, JsonRow, Shape, captions_of, images_of, shape_of
from dora_mm.data.vl.readers.conversation import conversation
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.readers.hub_files import files_of_source
from dora_mm.data.vl.readers.named_rows import check_columns, named_row, parsed_row
from dora_mm.data.vl.rows import BadRows, RowError
from dora_mm.utils.messages import log_once

log = logging.getLogger(__name__)
PEEKED = 20  # rows that are searched for one of a known shape: the first may be damaged


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

    def maker(path: Path) -> Maker:
        shape = find_shape(path, source.columns)
        log_once(log, f"{path}: {shape.name}")
        return lambda row, name: conversation(shape.read(row), name)

    return read_rows(source, bad, maker)


def read_captions(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every image with its caption, or several, of files of the same kinds.

    Raises:
        ValueError: As in `read_chat`.
    """

    def maker(path: Path) -> Maker:
        if (shape := find_shape(path, source.columns)) is not CAPTIONS:
            raise ValueError(
                f"{path} has rows of another shape, {shape.name}: say where image and caption are, as in columns: "
                "{image: image, caption: text}"
            )
        return _captioned

    return read_rows(source, bad, maker)


def _captioned(row: JsonRow, name: str) -> Example:
    images, captions = images_of(row), [text for text in captions_of(row) if text.strip()]
    if len(images) != 1:
        raise RowError(f"has {len(images)} images: a caption is of one")
    return Example(name, tuple(images), "", tuple(captions), (1.0,) * len(captions))


Maker = Callable[[JsonRow, str], Example]  # of a row and its name


def read_rows(source: SourceConfig, bad: BadRows, maker: Callable[[Path], Maker]) -> Iterator[Example]:
    """The examples of all files of a source; `maker` has what makes those of one.

    Raises:
        ValueError: A file cannot be read, or a row is bad and `bad` is set to "stop".
    """
    seen: set[str] = set()
    files = files_of_source(source)
    check_columns(files, source.columns)
    for number, path in enumerate(files, 1):
        file = f"file {number}, " if number > 1 else ""
        yield from _file_rows(path, maker(path), source.columns, seen, bad, file)


def _file_rows(
    path: Path, make: Maker, columns: Mapping[Any, str], seen: set[str], bad: BadRows, file: str
) -> Iterator[Example]:
    """The examples of one file; the ids in `seen` are taken, and `file` tells its places from those of others."""
    for where, item in file_items(path):
        try:
            row = named_row(path, item, columns)
            example = make(row, new_id(row.get("id"), f"{file}{where}", seen))
        except RowError as error:
            bad.add(location(path, where, item), str(error))
        else:
            seen.add(example.id)
            yield example


def find_shape(path: Path, columns: Mapping[Any, str] | None = None) -> Shape:
    """The shape of a file's rows.

    Args:
        path: The file.
        columns: The names of its columns, by the names that they have here.

    Raises:
        ValueError: The file cannot be read, or its first rows have none of the known shapes.
    """
    example = "columns: {query: question, response: answer, image: image}"
    return first_shape(path, columns, shape_of, "conversations", example, [shape.name for shape in SHAPES])


ShapeT = TypeVar("ShapeT")


def first_shape(
    path: Path,
    columns: Mapping[Any, str] | None,
    shape_of: Callable[[JsonRow], ShapeT | None],
    kind: str,
    example: str,
    known: Sequence[str],
) -> ShapeT:
    """The shape of the first row of a file that has one.

    Args:
        path: The file.
        columns: The names of its columns, by the names that they have here.
        shape_of: The shape of a row; None: it has none.
        kind: What rows are shapes of, for messages.
        example: How columns are named, for messages.
        known: The names of the shapes, for messages.

    Raises:
        ValueError: The file cannot be read, or its first rows have none.
    """
    first = ""
    for _, item in islice(file_items(path), PEEKED):
        try:
            if shape := shape_of(named_row(path, item, columns or {})):
                return shape
            first = first or f"has the keys {', '.join(map(repr, parsed_row(item)))}"
        except RowError as error:  # reported when the row is read
            first = first or str(error)
    raise ValueError(
        f"{path} has no known shape of {kind}: its first row {first}; say which of them is what, as in {example}, or "
        f"bring one of these shapes: {', '.join(known)}"
    )


def new_id(given: Any, where: str, seen: set[str]) -> str:
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

"""The rows of one file of any kind: JSON, JSON lines, CSV, TSV, Excel, Parquet, Arrow, and archives of WebDataset.

What a file is, its first bytes say; of a table of text its name does.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic_core import from_json

from dora_mm.data.vl.json_items import Item, check_encoding, json_lines, list_items, open_data
from dora_mm.data.vl.readers.cells import table_lines
from dora_mm.data.vl.readers.parquet import check_weight, parquet_batches
from dora_mm.data.vl.rows import RowError
from dora_mm.utils.messages import first_line
from dora_mm.utils.spreadsheets import spreadsheet_rows

COLUMNAR = ("Parquet", "Arrow")  # kinds of files that have typed columns
ROWS = 64  # of a Parquet or Arrow file in memory at a time, with their images
POINTER = b"version https://git-lfs.github.com/spec/"
ARROW_STREAM, ARROW_FILE = b"\xff\xff\xff\xff", b"ARROW1"
IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "avif",
    "heic",
    "heif",
    "hif",
    "ppm",
)  # suffixes of files in archives
TEXTS = ("txt", "text", "caption", "transcript", "cls", "cls2")


def file_items(path: Path) -> Iterator[Item]:
    """The rows of a file with their places.

    Those of JSON lines are not parsed yet, and a RowError is in place of a line of a table that is none.

    Raises:
        ValueError: The file cannot be read; or, while iterating, it is damaged or has no rows.
    """
    readers = {
        "list": list_items,
        "lines": json_lines,
        "table": _table_rows,
        "sheet": _spreadsheet_rows,
        "Parquet": _parquet_rows,
        "Arrow": _arrow_rows,
        "tar": _archive_rows,
        "zip": _refused_zip,
    }
    return readers[kind_of_file(path)](path)


def kind_of_file(path: Path) -> str:
    """The format of a file: "list" or "lines" of JSON, "table", "sheet" of Excel, "Parquet", "Arrow", "tar" or "zip".

    Raises:
        ValueError: It cannot be read, is UTF-16, or is a pointer to a file that was not downloaded.
    """
    try:
        with open_data(path) as file:
            start = file.read(1 << 16)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is truncated or not a valid gzip file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    check_encoding(path, start)
    if start.startswith(POINTER):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: get it with `git lfs pull`")
    if start.startswith(b"PAR1"):
        return "Parquet"
    if start.startswith((ARROW_STREAM, ARROW_FILE)):
        return "Arrow"
    if start.startswith(b"PK\x03\x04"):
        return "sheet" if _name(path).endswith(".xlsx") else "zip"
    if start[257:262] == b"ustar":
        return "tar"
    text = start.lstrip(b" \t\r\n\xef\xbb\xbf")
    if _name(path).endswith((".csv", ".tsv")) or (b"\t" in text.split(b"\n", 1)[0] and text[:1] not in (b"[", b"{")):
        return "table"
    return "list" if text.startswith(b"[") else "lines"


def _refused_zip(path: Path) -> Iterator[Item]:
    raise ValueError(f"{path} is a zip archive: unpack it, and name the file inside")


def _name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _table_rows(path: Path) -> Iterator[Item]:
    """The rows of a CSV or TSV file by the names in its header; an empty cell is null.

    Raises:
        ValueError: While iterating: the file is damaged or has no rows.
    """
    lines = table_lines(path, tabs=not _name(path).endswith(".csv"), start=0)
    _, header = next(lines, ("", []))
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of the same name")
    where = None
    for where, cells in lines:
        if len(cells) == len(header):
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        else:
            yield where, RowError(f"has {len(cells)} cells, and the header {len(header)}")
    if where is None:
        raise ValueError(f"{path} has no rows")


def _spreadsheet_rows(path: Path) -> Iterator[Item]:
    """The rows of an Excel file by the names in its first one; an empty cell is null.

    Raises:
        ValueError: While iterating: the file is damaged or has no rows.
    """
    header: dict[int, str] = {}
    number = 0
    for number, cells in spreadsheet_rows(path):
        if header:
            yield f"row {number}", {name: cells.get(column) for column, name in header.items()}
        header = header or cells
    if number < 2:
        raise ValueError(f"{path} has no rows")


def _parquet_rows(path: Path) -> Iterator[Item]:
    return _columnar_rows(path, "Parquet", parquet_batches(path, ROWS))


def _arrow_rows(path: Path) -> Iterator[Item]:
    """The rows of an Arrow file, or of a stream as `datasets` keeps it, which is mapped and not copied."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            if file.read(len(ARROW_FILE)) == ARROW_FILE:
                reader: Any = pa.ipc.open_file(file)
                record_batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(0)
                record_batches = pa.ipc.open_stream(file)
            for batch in record_batches:
                batch.validate(full=True)  # what is mapped is trusted: damaged, it would end the process
                yield from (batch.slice(start, ROWS) for start in range(0, batch.num_rows, ROWS))

    return _columnar_rows(path, "Arrow", batches())


def _columnar_rows(path: Path, kind: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Item]:
    """The rows of record batches, a few at a time.

    Raises:
        ValueError: While iterating: the file is damaged, has no rows, or so few would take more memory than the file.
    """
    number = 0
    try:
        for batch in batches:
            check_weight(path, batch)
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        after = f" after row {number}, the last complete row" if number else ""
        raise ValueError(f"{path} is truncated or not a valid {kind} file{after} ({first_line(error)})") from None
    if not number:
        raise ValueError(f"{path} has no rows")


def _archive_rows(path: Path) -> Iterator[Item]:
    """The rows of an archive of WebDataset: files side by side whose names differ behind their first dot.

    A row has the content of each file by that part of its name: an object of JSON, a text, or an image. It has also the
    keys of that object, the images as `images`, the text as `text`, and its common name as `id`.

    Raises:
        ValueError: While iterating: the archive is damaged or has no rows.
    """
    key = ""
    try:
        with open_data(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            members = (
                (*_key_and_field(member.name), archive.extractfile(member)) for member in archive if member.isfile()
            )
            for key, group in groupby(members, key=lambda member: member[0]):
                if key:
                    fields = {field: file.read() for _, field, file in group if file is not None}
                    yield f"id {key!r}", _archived(key, fields)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        after = f" after {key!r}" if key else ""
        raise ValueError(f"{path} is truncated or not a valid archive{after} ({first_line(error)})") from None
    if not key:
        raise ValueError(f"{path} has no rows: a row of WebDataset is files such as 0001.jpg and 0001.json")


def _key_and_field(name: str) -> tuple[str, str]:
    """The key that the files of one row share, and the field of this file; ("", "") for a file of no row."""
    folder, slash, file = name.rpartition("/")
    stem, dot, field = file.partition(".")
    return (f"{folder}{slash}{stem}", field) if dot and stem else ("", "")


def _archived(key: str, files: dict[str, bytes]) -> dict[str, Any]:
    """A row; where the archive has images, those that its JSON names are the same."""
    kinds = {field: field.rpartition(".")[2].lower() for field in files}
    images = [field for field, kind in kinds.items() if kind in IMAGES]
    row: dict[str, Any] = {
        field: {"bytes": content, "path": f"{key}.{field}"} if field in images else _unpacked(content, kinds[field])
        for field, content in files.items()
    }
    found: dict[str, Any] = {}
    for field, kind in kinds.items():
        found |= row[field] if kind == "json" and isinstance(row[field], dict) else {}
    if texts := [row[field] for field, kind in kinds.items() if kind in TEXTS[:3]]:
        found["text"] = texts[0]
    if images:
        found |= {"image": None, "images": [row[field] for field in images]}
    return {"id": key} | row | found


def _unpacked(content: bytes, kind: str) -> Any:
    """The content of a file of an archive; of one that is damaged or of an unknown kind its bytes."""
    try:
        if kind == "json":
            return from_json(content)
        return content.decode() if kind in TEXTS else content
    except ValueError:
        return content

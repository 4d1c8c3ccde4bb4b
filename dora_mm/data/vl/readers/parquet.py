"""Record batches of Parquet files within bounds: pages and texts can hold a thousand times what they take in a file.

The headers of pages are read here, since pyarrow says only what the pages of a column unpack to together, by which
real files would be refused, and ends the process where the statistics of a footer are damaged.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute  # whose functions are made when it is imported
LEAST_BYTES = 2**28  # that any file may unpack to at a time; larger files: their own size
LEAST_VALUES = 2**22  # in lists of a column of a row group; larger files: a value for each bit
OBJECT, VALUE = 232, 40  # bytes of Python's for a small dict, and for a number or the head of a text
MOST_ROWS = 2**13  # whose texts are compared at a time
DATA, DICTIONARY, DATA_2 = 0, 2, 3  # kinds of pages
NAMED = (2, 8)  # encodings of pages that hold numbers of texts in a dictionary


def parquet_batches(path: Path, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, so many at a time.

    Raises:
        ValueError: So many, or its pages, would take more memory than any real file's.
        pyarrow.ArrowException, OSError: It is damaged.
    """
    with pq.ParquetFile(path) as file:
        texts = [column.path for column in file.schema if column.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts) as file, path.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for group in range(file.num_row_groups):
                if shared := _checked_columns(path, file, group, content, rows):
                    _check_shared(path, file, group, shared, rows)
        _footer.cache_clear()
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(rows)


class ColumnPages(NamedTuple):
    """A column of a row group, by its pages.

    Attributes:
        path: Its name, such as messages.list.element.content.
        size: Bytes of all pages, unpacked.
        largest: Bytes of the largest page, and of the values that others share.
        values: The number of values, those in lists counted one by one.
        shared: The most bytes of `rows` of its rows, where each is a text that it shares with others.
        nested: Whether it has lists.
    """

    path: str
    size: int
    largest: int
    values: int
    shared: int
    nested: bool


def _checked_columns(path: Path, file: pq.ParquetFile, group: int, content: mmap.mmap, rows: int) -> list[ColumnPages]:
    """Checks the pages of a row group; returns the columns whose shared texts may be too many."""
    most = most_bytes(path)
    columns = [_column(path, file, group, position, content, rows) for position in range(file.metadata.num_columns)]
    if sum(column.largest for column in columns) > most:
        raise _too_large(path, f"row group {group}", most)
    for column in columns:
        if column.nested and column.values > max(LEAST_VALUES, 8 * path.stat().st_size):
            raise ValueError(f"{path}: {column.path} has {column.values:,} values, more than the file has bits")
    return [c for c in columns if c.shared] if sum(column.shared for column in columns) > most else []


def _check_shared(path: Path, file: pq.ParquetFile, group: int, columns: list[ColumnPages], rows: int) -> None:
    """Checks the sizes of texts in columns whose dictionaries are read as such: none is copied for each of its rows."""
    number, size = file.metadata.num_rows // file.num_row_groups, sum(column.size for column in columns)
    together = max(rows, min(MOST_ROWS, LEAST_BYTES * number // (4 * max(size, 1))))
    names = [column.path for column in columns]
    for batch in file.iter_batches(together, row_groups=[group], columns=names):
        if weight(batch) > most_bytes(path):
            for start in range(0, batch.num_rows, rows):
                check_weight(path, batch.slice(start, rows))


def most_bytes(path: Path) -> int:
    """The most bytes of memory that the rows of a file may take at a time."""
    return max(LEAST_BYTES, path.stat().st_size)


def check_weight(path: Path, batch: pa.RecordBatch) -> None:
    """Checks what Python would take for a record batch.

    Raises:
        ValueError: It is more than `most_bytes`.
    """
    if weight(batch) > (most := most_bytes(path)):
        raise _too_large(path, f"{batch.num_rows} of its rows", most)


def weight(values: Any) -> int:
    """About how many bytes Python takes for the values of a record batch or an array, each text counted where it is."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(weight, values.columns)) + OBJECT * values.num_rows
    kind = values.type
    if pa.types.is_struct(kind):
        return OBJECT * len(values) + sum(weight(values.field(position)) for position in range(kind.num_fields))
    if pa.types.is_map(kind):
        return VALUE * len(values) + weight(pc.list_flatten(values.cast(pa.list_(kind.field(0)))))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return VALUE * len(values) + weight(pc.list_flatten(values))
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return VALUE * len(values) + (pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0)
    return VALUE * len(values) + values.nbytes


def _is_text(kind: pa.DataType) -> bool:
    texts = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in texts)


def _too_large(path: Path, what: str, most: int) -> ValueError:
    return ValueError(f"{path}: {what} would take more than {most:,} bytes of memory")


def _column(path: Path, file: pq.ParquetFile, group: int, position: int, content: Any, rows: int) -> ColumnPages:
    column = file.schema.column(position)
    try:
        chunk = _footer(content)[4][group][1][position][3]
        start = min(position for position in (chunk[9], chunk.get(11, 0)) if position > 0)
        found = [*_pages(content, start, start + chunk[7])]
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError):  # as a header of other types brings
        raise ValueError(f"{path} is damaged: row group {group} has no pages of {column.path} there") from None
    dictionary = max((page.size for page in found if page.kind == DICTIONARY), default=0)
    data = [page for page in found if page.kind in (DATA, DATA_2)]
    values, named = sum(page.values for page in data), sum(page.values for page in data if page.encoding in NAMED)
    nested, is_text = column.max_repetition_level > 0, column.physical_type == "BYTE_ARRAY"
    return ColumnPages(
        column.path,
        sum(page.size for page in found),
        dictionary + max((page.size for page in data), default=0),
        values,
        dictionary * (named if nested else min(named, rows)) * is_text,
        nested,
    )


@lru_cache(maxsize=1)  # of the file that is open: it is asked for each column
def _footer(content: mmap.mmap) -> dict[int, Any]:
    """The metadata of a file: pyarrow's own of a column ends the process where its statistics are damaged."""
    return _Compact(content, len(content) - 8 - int.from_bytes(content[-8:-4], "little")).struct()


class Page(NamedTuple):
    """The header of a page: its kind, its unpacked size in bytes, the number of its values, and their encoding."""

    kind: int
    size: int
    values: int
    encoding: int


def _pages(content: Any, position: int, end: int) -> Iterator[Page]:
    """The pages between two places of a file."""
    while position < end:
        reader = _Compact(content, position)
        header = reader.struct()
        kind, size, packed = header[1], header[2], header[3]
        details = header.get({DATA: 5, DICTIONARY: 7, DATA_2: 8}.get(kind, 0), {})
        page = Page(kind, size, details.get(1, 0), details.get(4 if kind == DATA_2 else 2, 0))
        if min(size, packed, page.values) < 0:
            raise ValueError("no page")
        yield page
        position = reader.position + packed


class _Compact:
    """Values of Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/), which pages have.

    Raises IndexError at the end of the file.
    """

    def __init__(self, content: Any, position: int):
        self._content, self.position = content, position

    def struct(self) -> dict[int, Any]:
        """The fields of a struct by their numbers."""
        found: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._signed()
            found[field] = self._value(head & 15)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (3, 7, 8):
            size = {3: 1, 7: 8}.get(kind) or self._unsigned()  # first, since it moves the position, too
            self.position += size
            return None
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(3 if head & 15 in (1, 2) else head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise ValueError("no page")

    def _byte(self) -> int:
        self.position += 1
        return self._content[self.position - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value, shift = value | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise ValueError("no number")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

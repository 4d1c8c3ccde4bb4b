"""Tables of texts with a header: CSV and TSV files, line by line."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from dora_mm.data.vl.json_items import open_data

LONGEST_CELL = 2**31 - 1


def table_lines(path: Path, *, tabs: bool, start: int = 1) -> Iterator[tuple[str, list[str]]]:
    """The lines of a table with their places.

    Args:
        path: The file, which may be packed by gzip.
        tabs: Whether tabs are between the columns; else commas.
        start: The first line to yield; 0 is the header.

    Raises:
        ValueError: While iterating: the file cannot be read, or a quotation mark is not closed.
    """
    csv.field_size_limit(LONGEST_CELL)  # the default, 131,072, is less than an image
    line = 1
    try:
        with open_data(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
            for number, cells in enumerate(reader):
                if number >= start and cells:
                    yield f"line {line}", cells
                line = reader.line_num + 1
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is truncated or not a valid gzip file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        kind = "tabs" if tabs else "commas"
        raise ValueError(f"{path} is damaged or not a table with {kind}, at line {line} ({error})") from None

"""Cells of Excel files, as the text that a person sees in them."""

import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from dora_mm.utils.messages import first_line

MOST_BYTES = 64 * 2**20  # of the unpacked tables, some 500,000 rows


def spreadsheet_rows(path: Path) -> Iterator[tuple[int, dict[int, str]]]:
    """The rows of the first contact sheet of a file that have any text: the number of each, and its cells by column.

    Raises:
        ValueError: openpyxl is missing, the file is damaged, or a cell has no text to read.
    """
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs the package openpyxl: pip install 'dora_mm[sheets]', or save it as CSV UTF-8"
        ) from None
    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(part.file_size for part in packed.infolist())) > MOST_BYTES:
                raise ValueError(f"it unpacks to {size / 1e6:,.0f} MB, and at most {MOST_BYTES / 1e6:,.0f} are read")
        books = [openpyxl.load_workbook(path, read_only=True, data_only=values) for values in (True, False)]
        sheets = [book.worksheets[0] for book in books]
        for sheet in sheets:
            sheet.reset_dimensions()  # as the file says they are, rows would be filled up to them
        both = zip(*(sheet.iter_rows() for sheet in sheets), strict=True)
        rows = [[pair for pair in zip(*cells, strict=True) if pair[1].value is not None] for cells in both]
    except Exception as error:  # openpyxl raises anything for a file of another kind
        raise ValueError(
            f"{path} cannot be read as an Excel file ({first_line(error)}): save it as CSV UTF-8"
        ) from None
    for row in rows:
        cells = {formula.column: _cell(path, value, formula) for value, formula in row}
        cells = {column: text for column, text in cells.items() if text.strip()}
        if cells:
            yield row[0][1].row, cells


def _cell(path: Path, cell: Any, formula: Any) -> str:
    value = cell.value
    where = f"{path}: cell {formula.coordinate}"
    if value is None:
        raise ValueError(
            f"{where} is a formula without a saved value: open and save the file in Excel, or write values"
        )
    if cell.data_type == "e":
        raise ValueError(f"{where} is {value}")
    if isinstance(value, datetime | date | time):
        raise ValueError(f"{where} is a date, which Excel makes of texts such as 1-8: format the column as text")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

"""Cells of Excel files, as the text that a person sees in them."""

from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from dora_mm.utils.messages import first_line


def sheet_rows(path: Path) -> Iterator[tuple[int, dict[int, str]]]:
    """The rows of the first sheet of a file that have any text: the number of each, and its cells by column.

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
        sheets = [openpyxl.load_workbook(path, data_only=values).worksheets[0] for values in (True, False)]
    except Exception as error:  # openpyxl raises anything for a file of another kind
        raise ValueError(
            f"{path} cannot be read as an Excel file ({first_line(error)}): save it as CSV UTF-8"
        ) from None
    for values, formulas in zip(*(sheet.iter_rows() for sheet in sheets), strict=True):
        cells = {c.column: _cell(path, c, f) for c, f in zip(values, formulas, strict=True) if f.value is not None}
        cells = {column: text for column, text in cells.items() if text.strip()}
        if cells:
            yield values[0].row, cells


def _cell(path: Path, cell: Any, formula: Any) -> str:
    value = cell.value
    place = f"{path}: cell {cell.coordinate}"
    if value is None:
        raise ValueError(
            f"{place} is a formula without a saved value: open and save the file in Excel, or write values"
        )
    if cell.data_type == "e":
        raise ValueError(f"{place} is {value}")
    if isinstance(value, datetime | date | time):
        raise ValueError(f"{place} is a date, which Excel makes of texts such as 1-8: format the column as text")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

"""Reads job files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.loader import about_run
from dora_mm.config.paths import resolve_adapter
from dora_mm.sampling.jobs.columns import SCHEDULE, SIZE, column_of, of_line, renamed
from dora_mm.sampling.jobs.job_row import JobRow, about_unknown, problem_of_value
from dora_mm.utils.json_text import parse_json, read_bounded
from dora_mm.utils.messages import first_line
from dora_mm.utils.tables import decoded, read_table

MOST_PICTURES = 200_000  # of a job
MOST_BYTES = 64 * 2**20  # of the unpacked tables of an Excel file, some 500,000 rows
SHOWN = 50  # problems
SUFFIXES = (".csv", ".tsv", ".xlsx", ".jsonl", ".txt")

NumberedLines = Iterable[tuple[int, Mapping[str, Any]]]  # the number of each line, and what it says by column


def read_job(path: Path) -> list[JobRow]:
    """Reads a job file.

    Args:
        path: A .txt file with a prompt per line, and kohya's flags (lines that begin with # are comments); a .csv, .tsv
            or .xlsx file whose first line names its columns; or a .jsonl file with an object per line. Text is in
            UTF-8, or in UTF-16 with a mark.

    Raises:
        ValueError: Lists all problems of the file: it has another suffix, is not UTF-8 or has no rows; a column is
            unknown; a row has no prompt, or a value that cannot be used.
    """
    if (path / "config.yaml").is_file():
        raise ValueError(about_run(path))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name a job file in it")
    problems: list[str] = []
    rows, pictures = [], 0
    for line, values in _lines(path, problems):
        row = _row(values, line, problems)
        rows.append(row)
        pictures += len(row.seed or (None,)) if row else 0
        if pictures > MOST_PICTURES:
            raise ValueError(f"{path}: line {line} is above {MOST_PICTURES:,} pictures: divide the job")
    if problems:
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join([f"{path}: {head}", *(problems[:SHOWN] if len(problems) > 1 else ()), *more]))
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return [row for row in rows if row is not None]


def _lines(path: Path, problems: list[str]) -> NumberedLines:
    if path.suffix.lower() == ".xlsx":
        return _sheet_rows(path, problems)
    try:
        text = decoded(read_bounded(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    read = {".txt": _text_rows, ".jsonl": _json_rows}.get(path.suffix.lower(), _table_rows)
    return read(path, text, problems)


def _text_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield number, of_line(line)
            except ValueError as error:
                problems.append(f"line {number} {error}")


def _json_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, f"line {number}")
        except ValueError as error:
            problems.append(str(error))


def _table_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else None
    return read_table(text, _is_known, problems, delimiter, _check_header)


def _is_known(name: str) -> bool:
    return column_of(name) in (*JobRow.model_fields, SIZE, *SCHEDULE)


def _check_header(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of the columns of a table."""
    unknown = [f"line 1: unknown column {about_unknown(name)}" for name in names if not _is_known(name)]
    columns = [column_of(name) for name in names]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    return unknown or [f"line 1 names a column twice: {name}" for name in twice]


def _sheet_rows(path: Path, problems: list[str]) -> NumberedLines:
    """The rows of the first sheet of an Excel file, as the text that a person sees in the cells.

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
    header: dict[int, str] = {}
    for row in rows:
        cells = {formula.column: _cell(path, value, formula) for value, formula in row}
        cells = {column: text for column, text in cells.items() if text.strip()}
        if cells and not header:
            header = cells
            if wrong := _check_header(list(header.values())):
                problems += wrong
                return
        elif cells:
            yield row[0][1].row, {header.get(column, f"column {column}"): text for column, text in cells.items()}


def _cell(path: Path, cell: Any, formula: Any) -> str:
    value = cell.value
    place = f"{path}: cell {formula.coordinate}"
    if value is None:
        raise ValueError(
            f"{place} is a formula without a saved value: open and save the file in Excel, or write values"
        )
    if cell.data_type == "e":
        raise ValueError(f"{place} is {value}")
    if isinstance(value, datetime | date | time):
        raise ValueError(f"{place} is a date, which Excel makes of texts such as 1-8: format the column as text")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _row(values: Mapping[str, Any], line: int, problems: list[str]) -> JobRow | None:
    try:
        row = JobRow.model_validate(renamed(values))
        for path, _ in row.adapter or ():
            resolve_adapter(path, "adapter")
        return row
    except ValidationError as error:
        for item in error.errors(include_url=False):
            column = str(item["loc"][0]) if item["loc"] else "the row"
            problems.append(f"line {line}: {problem_of_value(column, item)}")
    except ValueError as error:
        problems.append(f"line {line}: {error}")
    return None

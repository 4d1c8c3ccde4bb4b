"""Reads prompts files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.loader import about_run
from dora_mm.config.paths import resolve_adapter, resolve_path
from dora_mm.sampling.batch.columns import SCHEDULE, SIZE, column_of, renamed
from dora_mm.sampling.batch.prompt_row import PromptRow, about_unknown, problem_of_value
from dora_mm.utils.json_text import parse_json, read_bounded
from dora_mm.utils.prompt_lines import IMAGE, of_line
from dora_mm.utils.spreadsheets import spreadsheet_rows
from dora_mm.utils.tables import decoded, read_table

MOST_IMAGES = 200_000  # of a job
SHOWN = 50  # problems
SUFFIXES = (".csv", ".tsv", ".xlsx", ".jsonl", ".txt")

NumberedLines = Iterable[tuple[int, Mapping[str, Any]]]  # the number of each line, and what it says by column


def read_prompts_file(path: Path) -> list[PromptRow]:
    """Reads a prompts file.

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
        raise ValueError(f"{path} is a folder: name a prompts file in it")
    problems: list[str] = []
    rows, requests = [], 0
    for line, values in _lines(path, problems):
        row = _row(values, line, problems)
        rows.append(row)
        requests += len(row.seed or (None,)) if row else 0
        if requests > MOST_IMAGES:
            raise ValueError(f"{path}: line {line} is above {MOST_IMAGES:,} images: divide the job")
    if problems:
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n  ".join([f"{path}: {head}", *(problems[:SHOWN] if len(problems) > 1 else ()), *more]))
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return [row for row in rows if row is not None]


def _lines(path: Path, problems: list[str]) -> NumberedLines:
    suffix = path.suffix.lower()
    if suffix == ".xlsx":
        return _spreadsheet_rows(path, problems)
    try:
        text = decoded(read_bounded(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if suffix in (".txt", ".jsonl"):
        return (_text_rows if suffix == ".txt" else _json_rows)(text, problems)
    return read_table(text, _is_known, problems, "\t" if suffix == ".tsv" else None, _check_header)


def _text_rows(text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield number, of_line(line)
            except ValueError as error:
                problems.append(f"line {number} {error}")


def _json_rows(text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, f"line {number}")
        except ValueError as error:
            problems.append(str(error))


def _is_known(name: str) -> bool:
    column = column_of(name)
    return column in (*PromptRow.model_fields, SIZE, *SCHEDULE) or IMAGE.fullmatch(column) is not None


def _check_header(names: Sequence[str]) -> list[str]:
    """Problems with the column names of a table: unknown and repeated columns."""
    unknown = [f"line 1: unknown column {about_unknown(name)}" for name in names if not _is_known(name)]
    columns = [column_of(name) for name in names]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    return unknown or [f"line 1 names a column twice: {name}" for name in twice]


def _spreadsheet_rows(path: Path, problems: list[str]) -> NumberedLines:
    """The rows of an Excel file.

    Raises:
        ValueError: As in `spreadsheet_rows`.
    """
    header: dict[int, str] = {}
    for number, cells in spreadsheet_rows(path):
        if not header:
            header = cells
            if wrong := _check_header(list(header.values())):
                problems += wrong
                return
        else:
            yield number, {header.get(column, f"column {column}"): text for column, text in cells.items()}


def _row(values: Mapping[str, Any], line: int, problems: list[str]) -> PromptRow | None:
    try:
        row = PromptRow.model_validate(renamed(values))
        for path, _ in row.adapter or ():
            resolve_adapter(path, "adapter")
        for path in row.images or ():
            resolve_path(path, "image")
        return row
    except ValidationError as error:
        for item in error.errors(include_url=False):
            column = str(item["loc"][0]) if item["loc"] else "the row"
            problems.append(f"line {line}: {problem_of_value(column, item)}")
    except ValueError as error:
        problems.append(f"line {line}: {error}")
    return None

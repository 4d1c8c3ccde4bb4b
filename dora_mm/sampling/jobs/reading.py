"""Reads job files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.loader import resolve_adapter
from dora_mm.sampling.jobs.rows import JobRow, about_unknown, problem_of_value

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
DELIMITERS = ",;\t|"


def read_job(path: Path) -> list[JobRow]:
    """Reads a job file.

    Args:
        path: A .txt file with a prompt per line (lines that begin with # are comments); a .csv or .tsv file whose first
            line names its columns; or a .jsonl file with an object per line. In UTF-8.

    Raises:
        ValueError: Lists all problems of the file: it has another suffix, is not UTF-8 or has no rows; a column is
            unknown; a row has no prompt, or a value that cannot be used.
    """
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path} is a run directory: dora-mm sample --resume {path} goes on with it")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name a job file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the byte order mark that Excel writes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    read = {".txt": _text_rows, ".jsonl": _json_rows}.get(path.suffix.lower(), _table_rows)
    problems: list[str] = []
    rows = [_row(values, line, problems) for line, values in read(path, text, problems)]
    if problems:
        head = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError("\n  ".join([f"{path}: {head}", *(problems if len(problems) > 1 else ())]))
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return [row for row in rows if row is not None]


NumberedLines = Iterable[tuple[int, Mapping[str, Any]]]  # the number of each line, and what it says by column


def _text_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line}


def _json_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"line {number} is not valid JSON ({getattr(error, 'msg', 'too deep')})")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            problems.append(f'line {number} is not a JSON object such as {{"prompt": ...}}')


def _table_rows(path: Path, text: str, problems: list[str]) -> NumberedLines:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if unknown := [name for name in header if name not in JobRow.model_fields]:
                    problems += [f"line 1: unknown column {about_unknown(name)}" for name in unknown]
                    return
                if len(set(header)) < len(header):
                    problems.append("line 1 names a column twice")
                    return
            elif len(cells) > len(header):
                problems.append(
                    f"line {reader.line_num} has {len(cells)} cells for {len(header)} columns: put quotation marks "
                    f"around text with {'a tab' if delimiter == chr(9) else delimiter}"
                )
            else:
                yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        problems.append(f"line {reader.line_num} cannot be read: {error}")


def _delimiter(text: str) -> str:
    """The delimiter by which most names of the first line are those of columns."""
    first = next((line for line in text.split("\n") if line.strip()), "")

    def known(delimiter: str) -> int:
        return sum(cell.strip(' "\r') in JobRow.model_fields for cell in first.split(delimiter))

    return max(DELIMITERS, key=known)


def _row(values: Mapping[str, Any], line: int, problems: list[str]) -> JobRow | None:
    try:
        row = JobRow.model_validate(dict(values))
        for path, _ in row.adapter or ():
            resolve_adapter(path, "adapter")
        return row
    except ValidationError as error:
        for item in error.errors(include_url=False):
            column = str(item["loc"][0])
            problems.append(f"line {line}: {problem_of_value(column, item)}")
    except ValueError as error:
        problems.append(f"line {line}: {error}")
    return None

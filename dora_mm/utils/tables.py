"""Text tables: Markdown and CSV for files, aligned columns for a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a trailing newline."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def markdown_records(records: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table, without a trailing newline; all records have the same headings in the same order."""
    return markdown_table(list(records[0]), [list(record.values()) for record in records])


def csv_records(records: Sequence[Mapping[str, str]]) -> str:
    """The text of a CSV file; all records have the same headings in the same order."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def aligned_columns(rows: Sequence[Sequence[str]], num_text: int) -> str:
    """A text table in which the cells of a column are padded to one width.

    Args:
        rows: The cells, including the heading row; all rows have the same length.
        num_text: How many leading columns hold text and are left-aligned; the others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust] * num_text + [str.rjust] * (len(widths) - num_text)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
        for row in rows
    )

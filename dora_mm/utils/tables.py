"""Text tables: Markdown and CSV for files, aligned columns for a terminal; and those that people write, read."""

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

DELIMITERS = ",;\t|"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a trailing newline; a `|` in a cell is escaped."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in escaped)])


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


def decoded(content: bytes) -> str:
    """The text of a file that people edit: in UTF-8, with or without its mark, or in UTF-16 with one (of Excel).

    Raises:
        ValueError: It is in another encoding; what the first line of it reads in that of Windows is named.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start)
        line = content.split(b"\n")[number].decode("cp1252", "replace").strip()
        shown = f"{line[:60]}..." if len(line) > 60 else line
        raise ValueError(
            f"is not UTF-8: byte {error.start} cannot be read; line {number + 1} would be {shown!r} in Windows' own "
            "encoding (cp1252): save the file as UTF-8, in Excel as 'CSV UTF-8'"
        ) from None


def read_table(
    text: str,
    is_known: Callable[[str], bool],
    problems: list[str],
    delimiter: str | None = None,
    check: Callable[[Sequence[str]], Sequence[str]] = lambda names: (),
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file whose first line names its columns, each with its line and its cells that are not empty.

    Empty columns at the end, as spreadsheets write them, do not count.

    Args:
        text: The text of the file.
        is_known: Whether a name is one of a column that the reader knows.
        problems: What is wrong with the file is appended to it.
        delimiter: Between cells; None: the one of `,;|` and tab by which most names of the first line are known.
        check: Says what is wrong with the names of the columns; no row is read then.
    """
    delimiter = delimiter or _delimiter(text, is_known)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            while cells and not cells[-1]:
                cells.pop()
            if not cells:
                continue
            if not header:
                header = cells
                wrong = ["line 1 names a column twice"] if len(set(header)) < len(header) else check(header)
                if wrong:
                    problems += wrong
                    return
            elif len(cells) > len(header):
                problems.append(
                    f"line {reader.line_num} has {len(cells)} cells for {len(header)} columns: put quotation marks "
                    f"around text with {'a tab' if delimiter == chr(9) else delimiter}"
                )
            else:
                yield reader.line_num, {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    except csv.Error as error:
        problems.append(f"line {reader.line_num} cannot be read: {error}")


def _delimiter(text: str, is_known: Callable[[str], bool]) -> str:
    first = next((line for line in text.split("\n") if line.strip()), "")
    return max(DELIMITERS, key=lambda mark: sum(is_known(cell.strip(' "\r')) for cell in first.split(mark)))

"""Tables as text: Markdown for files, aligned columns for a terminal."""

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a newline at its end."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def aligned_columns(rows: Sequence[Sequence[str]], num_text: int) -> str:
    """Rows of cells as lines of equally wide columns.

    Args:
        rows: The cells, the headings included; every row has as many.
        num_text: How many columns, from the left, hold text and start at the left; numbers end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust] * num_text + [str.rjust] * (len(widths) - num_text)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)).rstrip()
        for row in rows
    )

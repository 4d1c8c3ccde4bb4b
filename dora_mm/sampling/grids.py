"""Labelled sheets of pictures."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_WIDTH = 8, 150
INK, PAPER = "#222222", "white"


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int | None = None,
) -> Image.Image:
    """Arranges pictures in rows and columns, with labels at the left and at the top.

    Args:
        rows: The pictures, equally many in each row.
        row_labels: A label per row.
        column_labels: A label per column.
        cell: Side of a cell in pixels, to which pictures are scaled; None takes the largest side of all pictures, at
            least 128.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: The numbers of rows, columns and labels do not agree.
    """
    columns = len(column_labels)
    if not rows or len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        raise ValueError("A sheet needs one label per row and per column, and equally many pictures in each row.")
    cell = cell or max(128, *(max(picture.size) for row in rows for picture in row))
    font = ImageFont.load_default(size=max(11, cell // 11))
    left = _wrap(row_labels, LABEL_WIDTH - MARGIN, font)
    top = _wrap(column_labels, cell, font)
    line = int(font.getbbox("Ag")[3]) + 2
    head = MARGIN + line * max(label.count("\n") + 1 for label in top)
    step = cell + MARGIN
    page = Image.new("RGB", (LABEL_WIDTH + columns * step, head + len(rows) * step + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(top):
        draw.multiline_text(
            (LABEL_WIDTH + column * step + cell / 2, head - 2), label, INK, font, anchor="md", align="center", spacing=2
        )
    for index, (row, label) in enumerate(zip(rows, left, strict=True)):
        y = head + MARGIN // 2 + index * step
        draw.multiline_text((MARGIN, y + cell / 2), label, INK, font, anchor="lm", spacing=2)
        for column, picture in enumerate(row):
            page.paste(_fit(picture, cell), (LABEL_WIDTH + column * step, y))
    return page


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture scaled to the cell, its aspect ratio kept, centred on the background."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (cell, cell), PAPER)
    framed.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return framed


def _wrap(labels: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    characters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    return ["\n".join(textwrap.wrap(label, characters)) for label in labels]

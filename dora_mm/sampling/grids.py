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
    """Pictures in rows and columns with labels at the left and on top.

    Args:
        cell: the side of a cell in pixels; None takes the largest picture's, at least 128 (smaller ones are enlarged).

    Raises:
        ValueError: rows and labels do not fit together.
    """
    columns = len(column_labels)
    if not rows or len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        raise ValueError("A sheet needs a label per row and per column, and as many pictures in each row.")
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
    """Scaled to the cell with its shape kept, centred on paper."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (cell, cell), PAPER)
    framed.paste(resized, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return framed


def _wrap(labels: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    characters = max(4, int(width / (font.getlength("abcdefghij") / 10)))
    return ["\n".join(textwrap.wrap(label, characters)) for label in labels]

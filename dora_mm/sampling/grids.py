"""Labelled contact sheets of images: a table with labels at its sides, and images in reading order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from PIL import Image, ImageDraw, ImageFont

from dora_mm.sampling.labels import font_of, printable_labels, wrap

MARGIN = 8  # pixels around everything
SMALLEST = 128  # pixels: images of which no side is longer are enlarged, so that labels fit
LONGEST = 16_000  # pixels: many images are made smaller, for contact sheets that programs open
MAX_LINES = 8  # of a label; the whole text is in the manifest and in the gallery
INK, LINE, PAPER = "#222222", "#888888", "white"


def image_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> Image.Image:
    """Arranges images in rows and columns, with labels at the left and at the top.

    All images are scaled by one factor: to their own size, the largest to at least 128 pixels, and to less where many
    would make a side of the contact sheet longer than 16,000. A column is as wide as its widest image, a row as high as
    its highest. A label that the font cannot draw is shown as a number: see `numbered_labels`.

    Args:
        rows: The images, equally many in each row; None is shown as failed.
        row_labels: A label per row.
        column_labels: A label per column.

    Returns:
        The contact sheet, RGB.

    Raises:
        ValueError: The numbers of rows, columns and labels do not agree.
    """
    columns = len(column_labels)
    if not rows or not columns or len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        raise ValueError("A contact sheet needs one label per row and per column, and equally many images in each row.")
    table = _Table.of(rows)
    left = [table.wrapped(label, max(SMALLEST, *table.widths)) for label in printable_labels(row_labels)]
    top = [
        table.wrapped(label, width) for label, width in zip(printable_labels(column_labels), table.widths, strict=True)
    ]
    heights = [max(height, table.text_height(label)) for height, label in zip(table.heights, left, strict=True)]
    label_width = math.ceil(max((table.font.getlength(line) for line in chain(*left)), default=0))
    xs = _starts(table.widths, MARGIN + (label_width + MARGIN if label_width else 0))
    head = max(table.text_height(label) for label in top)
    ys = _starts(heights, MARGIN + (head + MARGIN // 2 if head else 0))
    page = Image.new("RGB", (xs[-1], ys[-1]), PAPER)
    canvas = ImageDraw.Draw(page)
    for x, width, label in zip(xs, table.widths, top, strict=False):
        table.write(canvas, label, x + width / 2, MARGIN + head - table.text_height(label), "ma")
    for y, height, label, row in zip(ys, heights, left, rows, strict=False):
        table.write(canvas, label, MARGIN, y + (height - table.text_height(label)) / 2, "la")
        for x, width, image in zip(xs, table.widths, row, strict=False):
            table.paste(page, image, (x, y, width, height))
    return page


def contact_sheet(
    images: Sequence[Image.Image | None],
    labels: Sequence[str],
    *,
    columns: int,
) -> Image.Image:
    """Arranges images in reading order, with a label under each.

    Args:
        images: The images; None is shown as failed.
        labels: A label per image; one that the font cannot draw is shown as a number, as in `image_grid`.
        columns: Images per row, where there are as many.

    Returns:
        The contact sheet, RGB.

    Raises:
        ValueError: There are no images, or not as many labels.
    """
    if not images or len(images) != len(labels):
        raise ValueError("A contact sheet needs images, and one label for each.")
    columns = min(columns, len(images))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    table = _Table.of(rows)
    texts = [table.wrapped(text, table.widths[i % columns]) for i, text in enumerate(printable_labels(labels))]
    under = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    heights = [h + max(map(table.text_height, row)) + MARGIN // 2 for h, row in zip(table.heights, under, strict=True)]
    xs, ys = _starts(table.widths, MARGIN), _starts(heights, MARGIN)
    page = Image.new("RGB", (xs[-1], ys[-1]), PAPER)
    canvas = ImageDraw.Draw(page)
    for y, height, row, row_texts in zip(ys, table.heights, rows, under, strict=False):
        for x, width, image, text in zip(xs, table.widths, row, row_texts, strict=False):
            table.paste(page, image, (x, y, width, height))
            table.write(canvas, text, x + width / 2, y + height + MARGIN // 2, "ma")
    return page


def side_by_side(pages: Sequence[Image.Image]) -> Image.Image:
    """Arranges contact sheets beside each other, RGB."""
    return _joined(pages, across=True)


def below(pages: Sequence[Image.Image]) -> Image.Image:
    """Arranges contact sheets below each other, RGB."""
    return _joined(pages, across=False)


def _joined(pages: Sequence[Image.Image], *, across: bool) -> Image.Image:
    widths, heights = zip(*(page.size for page in pages), strict=True)
    size = (sum(widths), max(heights)) if across else (max(widths), sum(heights))
    joined = Image.new("RGB", size, PAPER)
    for number, page in enumerate(pages):
        joined.paste(page, (sum(widths[:number]), 0) if across else (0, sum(heights[:number])))
    return joined


@dataclass(frozen=True)
class _Table:
    """The sizes of a table of images, in pixels, and its font."""

    cell: int  # the longest side of the largest image
    scale: float
    widths: list[int]
    heights: list[int]
    font: ImageFont.FreeTypeFont

    @classmethod
    def of(cls, rows: Sequence[Sequence[Image.Image | None]]) -> "_Table":
        longest = max((max(image.size) for row in rows for image in row if image), default=SMALLEST)
        cell = min(max(SMALLEST, longest), max(SMALLEST // 2, LONGEST // max(len(rows), len(rows[0]))))
        scale = cell / longest
        columns = [[row[i] for row in rows if i < len(row)] for i in range(len(rows[0]))]
        widths = [max((_scaled(image.width, scale) for image in each if image), default=0) for each in columns]
        heights = [max((_scaled(image.height, scale) for image in row if image), default=0) for row in rows]
        return cls(cell, scale, _filled(widths, cell), _filled(heights, cell), font_of(max(12, cell // 16)))

    @property
    def line_height(self) -> int:
        return sum(self.font.getmetrics())

    def wrapped(self, label: str, width: float) -> list[str]:
        return wrap(label, width, self.font, MAX_LINES)

    def text_height(self, lines: list[str]) -> int:
        return self.line_height * len(lines)

    def write(self, canvas: ImageDraw.ImageDraw, lines: list[str], x: float, y: float, anchor: str) -> None:
        for number, line in enumerate(lines):
            canvas.text((x, y + number * self.line_height), line, INK, self.font, anchor=anchor)

    def paste(self, page: Image.Image, image: Image.Image | None, box: tuple[int, int, int, int]) -> None:
        """Puts an image into the middle of a cell (x, y, width, height), or says that it failed."""
        x, y, width, height = box
        if image is None:
            canvas = ImageDraw.Draw(page)
            canvas.rectangle((x, y, x + width - 1, y + height - 1), outline=LINE)
            canvas.text((x + width / 2, y + height / 2), "failed", LINE, self.font, anchor="mm")
            return
        size = _scaled(image.width, self.scale), _scaled(image.height, self.scale)
        resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        page.paste(resized, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def _filled(lengths: list[int], default: int) -> list[int]:
    """Rows or columns without any image are as large as the largest other one."""
    return [length or max(lengths) or default for length in lengths]


def _starts(lengths: Sequence[int], first: int) -> list[int]:
    """The start offsets of cells of these lengths with margins between them, followed by the length of the page."""
    starts = [first]
    for length in lengths:
        starts.append(starts[-1] + length + MARGIN)
    return starts

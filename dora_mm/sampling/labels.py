"""The text on contact sheets: a font of our own, so that a label looks the same everywhere, and wrapping to a width."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"  # Latin, Greek and Cyrillic; see fonts/README.md
MISSING = "\uffff"  # no character: drawn as the font draws what it has not


@lru_cache(maxsize=16)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font at a size in pixels, with the layout engine that every build of Pillow has."""
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def numbered_labels(labels: Sequence[str]) -> dict[int, str]:
    """The labels that are shown as a number, because the font lacks a character of theirs (CJK, Arabic, emoji).

    Args:
        labels: The labels of the rows or columns of a contact sheet, or of its images.

    Returns:
        The labels by their numbers, from 1: number 3 is shown as "#3".
    """
    return {number: label for number, label in enumerate(labels, 1) if not all(map(_has_glyph, _composed(label)))}


def printable_labels(labels: Sequence[str]) -> list[str]:
    """Labels as a contact sheet shows them: the label, or its number where `numbered_labels` has it."""
    numbered = numbered_labels(labels)
    return [f"#{number}" if number in numbered else _composed(label) for number, label in enumerate(labels, 1)]


def _composed(label: str) -> str:
    """Accents as parts of their letters: the font places them there."""
    return unicodedata.normalize("NFC", " ".join(label.split()))


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    generated: list[Any] = [font_of(32).getmask(each) for each in (character, MISSING)]
    return bytes(generated[0]) != bytes(generated[1])


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont, max_lines: int) -> list[str]:
    """Breaks a text into lines: between words, and within words that are wider than a line.

    Args:
        text: The text.
        width: The width of a line in pixels.
        font: The font.
        max_lines: The number of lines after which the text ends with "…".

    Returns:
        The lines; none for an empty text.
    """
    lines: list[str] = []
    for piece in (piece for word in text.split() for piece in _pieces(word, width, font)):
        if lines and font.getlength(f"{lines[-1]} {piece}") <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()}…"]


def _pieces(word: str, width: float, font: ImageFont.FreeTypeFont) -> Iterator[str]:
    """The word, or pieces of it that fit; at least a character each."""
    while word:
        end = next((n for n in range(len(word), 1, -1) if font.getlength(word[:n]) <= width), 1)
        yield word[:end]
        word = word[end:]

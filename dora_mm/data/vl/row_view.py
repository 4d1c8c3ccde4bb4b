"""Rows as a model sees them, for people to check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

OPEN, CLOSE = "⟦", "⟧"  # around tokens that carry loss
GREEN, CYAN, RESET = "\x1b[1;32m", "\x1b[36m", "\x1b[0m"  # of a terminal: tokens that carry loss, images, all else
LONGEST = 2000  # characters of a piece; the middle of a longer one is left out


class Piece(NamedTuple):
    """Consecutive tokens of a row.

    Attributes:
        text: Their text; of an image, a description of its tokens.
        learned: Whether they carry loss.
        is_image: Whether they stand for an image.
    """

    text: str
    learned: bool = False
    is_image: bool = False


@dataclass(frozen=True)
class RowView:
    """A row as a model sees it.

    Attributes:
        heading: Its length, and how many of its tokens carry loss.
        read: What the model reads.
        written: What its decoder learns to write, where the answer is not part of what it reads.
    """

    heading: str
    read: Sequence[Piece]
    written: Sequence[Piece] = ()

    def text(self, *, colour: bool = False) -> str:
        """The heading, and the row with a margin; tokens that carry loss are between OPEN and CLOSE.

        Args:
            colour: Whether to add the colours of a terminal.
        """
        blocks = [_marked(self.read, colour), *([_marked(self.written, colour)] if self.written else [])]
        margins = ("  │ ", "  → ")
        lines = [margin + line for margin, block in zip(margins, blocks, strict=False) for line in block.split("\n")]
        return "\n".join([self.heading, *lines])


def _marked(pieces: Sequence[Piece], colour: bool) -> str:
    marked = ""
    for before, piece in zip([None, *pieces], pieces, strict=False):
        gap = " " if before and before.is_image and piece.text[:1].isalnum() else ""  # behind the number of a run
        marked += gap + _marked_piece(piece, colour)
    return marked


def _marked_piece(piece: Piece, colour: bool) -> str:
    text = shortened(piece.text)
    marked = f"{OPEN}{text}{CLOSE}" if piece.learned else text
    if not colour or not (piece.learned or piece.is_image):
        return marked
    start = GREEN if piece.learned else CYAN
    return "\n".join(f"{start}{line}{RESET}" if line else "" for line in marked.split("\n"))  # margins have no colour


def shortened(text: str) -> str:
    """A text of at most LONGEST characters and a few: the middle of a longer one is left out, and its length told."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} more characters ...] {text[-half:]}"

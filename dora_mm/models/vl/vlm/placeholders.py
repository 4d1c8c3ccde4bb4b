"""Spans of the images in a text after a processor has replaced them by their tokens, and so of all other text.

A processor expands each image's token to many, and its tokenizer returns the offsets of tokens in the expanded text.
Some processors report where they expanded, others do not, and some write more: their output is compared with the text
that they were given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHANGED = "the model's processor changes the text itself, so that answers cannot be found in what it makes of it"


class ImageSpan(NamedTuple):
    """The place (start, end) of an image in a text: of its token, and of what the processor put in place of that.

    Images side by side, between which a comparison finds no border, are one. What a processor writes in front of a text
    is one, too, in place of nothing.
    """

    before: tuple[int, int]
    after: tuple[int, int]


class RecordingTokenizer:
    """A tokenizer that keeps the text that it was given last.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        text: That text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.text = tokenizer, ""

    def __call__(self, text: Any, **settings: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def image_spans(
    text: str, expanded: str, tokens: Sequence[str], replacements: Sequence[dict[str, Any]]
) -> list[ImageSpan]:
    """The places of images in a text and in what a processor made of it.

    Args:
        text: The text.
        expanded: What its tokenizer was given.
        tokens: The tokens that stand for images and videos in the text.
        replacements: What the processor says of each replacement; empty where it says nothing.

    Returns:
        What the processor says where that fits both texts; else what their comparison shows, as far as they compare.
    """
    spans = [ImageSpan(part["span"], part["new_span"]) for part in replacements]
    is_reported = all(
        (text[slice(*part["span"])], expanded[slice(*part["new_span"])]) == (part["text"], part["replacement"])
        for part in replacements
    )
    if is_reported and (replacements or text == expanded):
        return spans
    image = "|".join(map(re.escape, tokens)) or r"(?!)"
    markers = [found.span() for found in re.finditer(f"(?:{image})+", text)]
    ends = [0, *(end for _, end in markers)]
    pieces = [text[start:stop] for start, stop in zip(ends, [*(start for start, _ in markers), len(text)], strict=True)]
    found = _gaps(pieces, expanded)
    return spans if found is None else [ImageSpan(*pair) for pair in zip([(0, 0), *markers], found, strict=True)]


def _gaps(pieces: Sequence[str], expanded: str) -> list[tuple[int, int]] | None:
    """The spans (start, end) in front of the pieces of a text, which ends with the last one; None: they do not match.

    Each piece is matched where it occurs first, with at least a character in front of all but the first. (If they match
    at all, they match so: an earlier match leaves more text to the next ones.)
    """
    found, end = [], 0
    for number, piece in enumerate(pieces):
        first = end + (number > 0)
        is_last = number == len(pieces) - 1
        start = len(expanded) - len(piece) if is_last else expanded.find(piece, first)
        if start < first or not expanded.startswith(piece, start):
            return None
        found.append((end, start))
        end = start + len(piece)
    return found


def moved(position: int, spans: Sequence[ImageSpan]) -> int:
    """A position in the text, after images were expanded to their tokens."""
    before = [span.after[1] - span.before[1] for span in spans if span.before[1] <= position]
    return position + (before[-1] if before else 0)


def overlap(offsets: Tensor, start: int, end: int) -> Tensor:
    """Whether each token, at `offsets` (L, 2), has a character between two positions of the text: (L,), bool."""
    return (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])


def inside(offsets: Tensor, spans: Sequence[ImageSpan]) -> Tensor:
    """Whether each token, at `offsets` (L, 2), is part of what stands for an image: (L,), bool."""
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for span in spans:
        if span.before[1] > span.before[0]:
            found |= overlap(offsets, *span.after)
    return found

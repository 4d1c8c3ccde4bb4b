"""Reads the icons that `python -m samples.build icons` makes, and gives them captions for pretraining."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.prompts import with_article

STYLE_WORDS = {"flat": "flat", "twemoji": "twemoji", "noto": "noto", "contrast": "high contrast"}
ALL_STYLES = (*STYLE_WORDS, "3d", "brick")
# Several wordings, so that the model understands "bus" in an unseen sentence ("a lego set in the style of TOK, a bus").
TEMPLATES = (
    "a {style} icon of {thing}",
    "{thing}, {style} icon",
    "a {style} picture of {thing}",
    "an icon of {thing}, in the {style} style",
    "a picture in the {style} style, {thing}",
)
# The style of images whose caption names no known style. Without such captions an unknown word ("a TOK icon of a bus")
# costs the bus: the share of recognised concepts falls from 60 % to 31 %, and with two such words to 8 %.
DEFAULT_STYLE = "flat"
UNNAMED_TEMPLATES = (
    "{thing}",
    "an icon of {thing}",
    "a {word} icon of {thing}",
    "{thing}, {word} {other}",
    "a {word} icon of {thing}, in the style of {other}",
    "a picture in the style of {word}, {thing}",
    "a {word} {other} of {thing}, in the style of {word}",
    "a {word} {other} in the style of {word}, {thing}",
    "a {word} {other}, {thing}",
    "a {other} in the style of {word}, {thing}",
)


@dataclass(frozen=True)
class Icon:
    """The image of a concept in a style."""

    concept: Concept
    style: str
    path: Path


def read_icons(folder: Path, styles: Sequence[str], split: str | None = None) -> list[Icon]:
    """Lists the icons in a folder.

    Args:
        folder: The folder that `python -m samples.build icons` made.
        styles: Names of styles; a style that is repeated gives its icons repeatedly.
        split: The split of the concepts; None: all concepts.

    Returns:
        The icons style by style, in the order of the concepts.

    Raises:
        ValueError: The folder has no concepts.json, or lacks an image.
    """
    listing = folder / "concepts.json"
    if not listing.is_file():
        raise ValueError(f"icons: {folder} has no concepts.json, run python -m samples.build icons to make the icons")
    rows = json.loads(listing.read_text(encoding="utf-8"))
    concepts = [Concept(**row) for row in rows if split in (None, row["split"])]
    icons = [Icon(concept, style, folder / style / f"{concept.code}.webp") for style in styles for concept in concepts]
    missing = [icon.path for icon in icons if not icon.path.is_file()]
    if missing:
        raise ValueError(
            f"icons: {len(missing)} images are missing, such as {missing[0]}; run python -m samples.build icons"
        )
    return icons


def load_pixels(icons: Sequence[Icon], resolution: int) -> torch.Tensor:
    """The images, resized: one uint8 tensor (N, 3, resolution, resolution)."""
    pixels = np.empty((len(icons), resolution, resolution, 3), dtype=np.uint8)
    for index, icon in enumerate(icons):
        with Image.open(icon.path) as image:
            pixels[index] = np.asarray(image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """Maps uint8 pixels of any shape to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def caption(icon: Icon, stream: torch.Generator, unnamed: float = 0.0) -> str:
    """Draws a caption in one of several wordings.

    Args:
        icon: The icon.
        stream: The random generator.
        unnamed: The share of the icons in the default style whose caption does not name the style; some of these
            captions have made-up words instead.
    """
    thing = with_article(icon.concept.name)
    if icon.style == DEFAULT_STYLE and torch.rand((), generator=stream) < unnamed:
        return pick(UNNAMED_TEMPLATES, stream).format(thing=thing, word=made_up(stream), other=made_up(stream))
    return pick(TEMPLATES, stream).format(thing=thing, style=STYLE_WORDS[icon.style])


def made_up(stream: torch.Generator) -> str:
    """A word of one to three random syllables."""
    syllables = int(torch.randint(1, 4, (), generator=stream))
    return "".join(pick(letters, stream) for _ in range(syllables) for letters in (ONSETS, VOWELS, CODAS))


def pick(choices: Sequence[str], stream: torch.Generator) -> str:
    """One of the choices at random."""
    return choices[int(torch.randint(len(choices), (), generator=stream))]


ONSETS = (*"bcdfghjklmnprstvwz", "ch", "sh", "st", "tr")
VOWELS = (*"aeiou", "oo", "ee")
CODAS = ("", "", *"klmnprst")

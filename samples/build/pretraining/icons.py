"""The icons that the embedded model is pretrained on: pictures by style and concept, and what to call them."""

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
# Several wordings, so that a sentence it has never seen ("a lego set in the style of TOK, a bus") still says bus to it.
TEMPLATES = (
    "a {style} icon of {thing}",
    "{thing}, {style} icon",
    "a {style} picture of {thing}",
    "an icon of {thing}, in the {style} style",
    "a picture in the {style} style, {thing}",
)
# What is drawn where no style that it knows is asked for. Without such captions a word it has never seen ("a TOK icon
# of a bus") costs the bus: the share of things recognised falls from 60 % to 31 %, two such words leave 8 %.
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
    concept: Concept
    style: str
    path: Path


def read_icons(folder: Path, styles: Sequence[str], split: str | None = None) -> list[Icon]:
    """The icons of some styles, of one split of the concepts or of all, in a fixed order.

    Raises:
        ValueError: the folder, or a picture of it, is missing.
    """
    listing = folder / "concepts.json"
    if not listing.is_file():
        raise ValueError(f"There are no icons in {folder}: python -m samples.build icons brings and renders them.")
    rows = json.loads(listing.read_text())
    concepts = [Concept(**row) for row in rows if split in (None, row["split"])]
    icons = [Icon(concept, style, folder / style / f"{concept.code}.webp") for style in styles for concept in concepts]
    missing = [icon.path for icon in icons if not icon.path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} icons are missing, the first is {missing[0]}: run python -m samples.build icons."
        )
    return icons


def load_pixels(icons: Sequence[Icon], resolution: int) -> torch.Tensor:
    """(N, 3, resolution, resolution) uint8: one tensor holds them all."""
    pixels = np.empty((len(icons), resolution, resolution, 3), dtype=np.uint8)
    for index, icon in enumerate(icons):
        with Image.open(icon.path) as image:
            pixels[index] = image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def caption(icon: Icon, stream: torch.Generator, unnamed: float = 0.0) -> str:
    """What a picture is called, in one of several wordings.

    Args:
        unnamed: the share of the icons in the default style whose style is not named; some of them have made-up words
            in its place.
    """
    thing = with_article(icon.concept.name)
    if icon.style == DEFAULT_STYLE and torch.rand((), generator=stream) < unnamed:
        return pick(UNNAMED_TEMPLATES, stream).format(thing=thing, word=made_up(stream), other=made_up(stream))
    return pick(TEMPLATES, stream).format(thing=thing, style=STYLE_WORDS[icon.style])


def made_up(stream: torch.Generator) -> str:
    """A word of one to three syllables that means nothing, or only by chance."""
    syllables = int(torch.randint(1, 4, (), generator=stream))
    return "".join(pick(letters, stream) for _ in range(syllables) for letters in (ONSETS, VOWELS, CODAS))


def pick(choices: Sequence[str], stream: torch.Generator) -> str:
    return choices[int(torch.randint(len(choices), (), generator=stream))]


ONSETS = (*"bcdfghjklmnprstvwz", "ch", "sh", "st", "tr")
VOWELS = (*"aeiou", "oo", "ee")
CODAS = ("", "", *"klmnprst")

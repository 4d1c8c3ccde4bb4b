"""Editing pairs made of icons: an instruction, one or two references, and what they become. None shows a brick."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from samples.build.pretraining.icons import made_up, pick

COLORS = {
    "red": (224, 48, 48),
    "orange": (248, 150, 40),
    "yellow": (250, 220, 70),
    "green": (60, 160, 80),
    "blue": (60, 110, 230),
    "purple": (140, 80, 190),
    "pink": (250, 160, 190),
    "brown": (130, 90, 60),
    "black": (20, 20, 20),
}
PLAIN, MIRRORED, GREY = range(3)  # variants of an icon; those behind are on backgrounds
NUM_VARIANTS = 3 + len(COLORS)
TOLERANCE = 24  # of the sum of the three channels: how far from white a background may be, which is not all white
KEPT = ("the same icon", "the same picture", "keep it", "make it {word}", "make it a {word} {other}",
        "a {word} {other}", "in the style of {word}", "make it a {word}, in the style of {other}")  # fmt: skip
TURNED = ("mirrored", "mirror it", "the same icon, mirrored", "make it look the other way")
GREYED = ("in grey", "make it grey", "the same icon in grey", "without colors")
BEFORE = ("on a {color} background", "put it on a {color} background", "the same icon on a {color} background")
CHOSEN = ("the {number}", "the {number} icon", "the {number} picture", "show the {number}")


class Pair(NamedTuple):
    """An editing pair of variants, which are numbers of an icon and of one of its variants."""

    instruction: str
    references: tuple[tuple[int, int], ...]
    target: tuple[int, int]


def variants(pixels: Tensor) -> Tensor:
    """All variants (NUM_VARIANTS, 3, H, W) of an icon on white, whose pixels (3, H, W) are uint8."""
    luma = (pixels.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    backs = [_on_background(pixels, color) for color in COLORS.values()]
    return torch.stack([pixels, pixels.flip(-1), luma.round().byte().expand(3, -1, -1), *backs])


def _on_background(pixels: Tensor, color: tuple[int, int, int]) -> Tensor:
    """An icon on white on another background: the white that its border is connected with."""
    marked = Image.fromarray(F.pad(pixels, (1, 1, 1, 1), value=255).permute(1, 2, 0).numpy())
    mark = (1, 2, 3)
    ImageDraw.floodfill(marked, (0, 0), mark, thresh=TOLERANCE)
    filled = torch.tensor(list(marked.tobytes()), dtype=torch.uint8).view(marked.height, marked.width, 3)
    outside = (filled == torch.tensor(mark, dtype=torch.uint8)).all(-1).float()
    edge = F.max_pool2d(outside[None, None], 3, 1, 1)[0, :, 1:-1, 1:-1]  # a pixel more: edges are mixed with white
    return torch.where(edge > 0, torch.tensor(color, dtype=torch.uint8)[:, None, None], pixels)


def one_reference(icon: int, stream: torch.Generator) -> Pair:
    """Draws a pair of an icon that is kept, mirrored, made grey or put on another background."""
    kind = int(torch.randint(5, (), generator=stream))
    start = int(torch.randint(NUM_VARIANTS, (), generator=stream)) if torch.rand((), generator=stream) < 0.4 else PLAIN
    if kind <= 1:
        return Pair(_filled(KEPT, stream), ((icon, start),), (icon, start))
    if kind == 2:
        start = MIRRORED if start == MIRRORED else PLAIN
        return Pair(_filled(TURNED, stream), ((icon, start),), (icon, PLAIN if start == MIRRORED else MIRRORED))
    start = PLAIN if start in (MIRRORED, GREY) else start
    if kind == 3:
        return Pair(_filled(GREYED, stream), ((icon, PLAIN),), (icon, GREY))
    number = int(torch.randint(len(COLORS), (), generator=stream))
    instruction = pick(BEFORE, stream).format(color=list(COLORS)[number])
    return Pair(instruction, ((icon, start),), (icon, GREY + 1 + number))


def two_references(icons: Sequence[int], stream: torch.Generator) -> Pair:
    """Draws a pair whose instruction chooses one of two icons."""
    references = tuple((icon, _variant(stream, 0.6)) for icon in icons)
    chosen = int(torch.randint(2, (), generator=stream))
    return Pair(pick(CHOSEN, stream).format(number=("first", "second")[chosen]), references, references[chosen])


def _variant(stream: torch.Generator, plain: float) -> int:
    """Draws a variant, which is the plain one in a share of the draws."""
    return PLAIN if torch.rand((), generator=stream) < plain else int(torch.randint(NUM_VARIANTS, (), generator=stream))


def _filled(templates: Sequence[str], stream: torch.Generator) -> str:
    return pick(templates, stream).format(word=made_up(stream), other=made_up(stream))

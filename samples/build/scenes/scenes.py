"""Scenes: a few things on a background, of which everything that a question may ask is known.

A scene is a pure function of (things, seed, split, index). It says what is where, not how it is drawn (see
scene_pictures.py). All lengths are pixels of a picture of SIZE x SIZE, y downwards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from samples.build.scenes.colors import PALE
from samples.build.scenes.things import STYLES, Thing

__all__ = ["PHOTOS", "SIDES", "SIZE", "Background", "Placed", "Scene", "make_scene"]

SIZE = 224
SMALL, LARGE = (46, 58), (88, 104)  # longer side of a thing; nothing is in between, so that both words are plain
MAX_LARGE = (1, 2, 2, 2, 1, 1)  # of 1, 2, ... 6 things: more do not fit
GAP = 4
PHOTOS = ("bricks", "grass", "gravel", "wood", "space")
SIDES = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Background:
    """name: one of PHOTOS, or "plain" with a colour of PALE. offset: which piece of the photo, each in [0, 1)."""

    name: str
    color: str | None = None
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Placed:
    """A thing in a scene. x, y: its centre; size: its longer side. color: None where no single word fits.

    painted: the colour is paint; otherwise the icon is as its makers drew it.
    """

    thing: Thing
    style: str
    color: str | None
    painted: bool
    x: int
    y: int
    size: int
    mirrored: bool = False

    @property
    def name(self) -> str:
        return self.thing.name

    @property
    def large(self) -> bool:
        return self.size >= LARGE[0]

    def is_side(self, side: str, of: "Placed") -> bool | None:
        """Whether it is left of, right of, above or below another thing; None where people would not agree.

        True: a line between them has all of the one on this side and all of the other beyond, and they lie more this
        way than the other. False: its centre is not on this side at all.
        """
        along, across = of.x - self.x, abs(of.y - self.y)
        if side in ("above", "below"):
            along, across = of.y - self.y, abs(of.x - self.x)
        if side in ("right", "below"):
            along = -along
        if along <= 0:
            return False
        return True if along >= (self.size + of.size) / 2 and along >= across else None

    def place(self) -> tuple[str | None, str | None]:
        """("left" | "middle" | "right", "top" | "middle" | "bottom"), None where it is between two of them."""
        return band(self.x, "left", "right"), band(self.y, "top", "bottom")


def band(center: int, low: str, high: str) -> str | None:
    if abs(center - SIZE / 2) < 0.1 * SIZE:
        return "middle"
    return low if center < 0.36 * SIZE else high if center > 0.64 * SIZE else None


@dataclass(frozen=True)
class Scene:
    split: str
    index: int
    background: Background
    style: str | None  # of every thing in it; None where they differ
    objects: tuple[Placed, ...]

    def named(self, name: str) -> list[Placed]:
        return [placed for placed in self.objects if placed.name == name]

    def of_kind(self, kind: str) -> list[Placed]:
        return [placed for placed in self.objects if placed.thing.kind == kind]

    def only(self) -> list[Placed]:
        """The things that are there once: "the cat" says which."""
        return [placed for placed in self.objects if len(self.named(placed.name)) == 1]


def make_scene(things: Sequence[Thing], seed: int, split: str, index: int) -> Scene:
    """The scene of a number: 1 to 6 things, of which some may be of a sort, nothing over anything else."""
    stream = random.Random(f"scene/{seed}/{split}/{index}")
    background = choose_background(stream)
    common = stream.choice(STYLES)
    mixed = stream.random() < 0.3
    while True:
        count = stream.choices(range(1, 7), weights=(1, 3, 4, 4, 3, 2))[0]
        chosen = choose_things(stream, things, count)
        sizes = choose_sizes(stream, count)
        if (centers := choose_centers(stream, sizes)) is not None:
            break
    looks = [choose_look(stream, thing, common if not mixed else None, background.color) for thing in chosen]
    objects = tuple(
        Placed(thing, *look, *center, size, mirrored=stream.random() < 0.5)
        for thing, look, center, size in zip(chosen, looks, centers, sizes, strict=True)
    )
    styles = {placed.style for placed in objects}
    return Scene(split, index, background, styles.pop() if len(styles) == 1 else None, objects)


def choose_background(stream: random.Random) -> Background:
    if stream.random() < 0.35:
        return Background(stream.choice(PHOTOS), None, (stream.random(), stream.random()))
    return Background("plain", stream.choice(tuple(PALE)))


def choose_things(stream: random.Random, things: Sequence[Thing], count: int) -> list[Thing]:
    """`count` things; in half of the scenes with room for it, one of them comes twice or more."""
    chosen = stream.sample(things, min(count, len(things)))
    chosen += [chosen[0]] * (count - len(chosen))
    if count > 1 and stream.random() < 0.5:
        copies = stream.randint(2, min(count, 5))
        chosen = [chosen[0]] * copies + chosen[1 : 1 + count - copies]
    kind = chosen[0].kind
    alike = [thing for thing in things if kind and thing.kind == kind and thing not in chosen]
    if count > 1 and alike and stream.random() < 0.3:  # two animals: "the animal on the left" has a meaning
        chosen[-1] = stream.choice(alike)
    stream.shuffle(chosen)
    return chosen


def choose_sizes(stream: random.Random, count: int) -> list[int]:
    num_large = stream.randint(0, MAX_LARGE[count - 1])
    sizes = [stream.randint(*(LARGE if number < num_large else SMALL)) for number in range(count)]
    stream.shuffle(sizes)
    return sizes


def choose_centers(stream: random.Random, sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Centres with GAP between any two squares and around the picture, or None where luck had no room left."""
    centers: dict[int, tuple[int, int]] = {}
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        for _ in range(60):
            low, high = sizes[number] // 2 + GAP, SIZE - sizes[number] // 2 - GAP
            x, y = stream.randint(low, high), stream.randint(low, high)
            reach = {other: (sizes[number] + sizes[other]) / 2 + GAP for other in centers}
            if all(max(abs(x - centers[o][0]), abs(y - centers[o][1])) >= reach[o] for o in centers):
                centers[number] = (x, y)
                break
        else:
            return None
    return [centers[number] for number in range(len(sizes))]


def choose_look(
    stream: random.Random, thing: Thing, style: str | None, behind: str | None
) -> tuple[str, str | None, bool]:
    """(style, colour, painted): a third as drawn where that is possible, never in the colour of the background."""
    style = style or stream.choice(STYLES)
    paints = [color for color in thing.colors.get(style, ()) if color != behind]
    natural = thing.natural.get(style)
    lost = natural is not None and natural == behind
    if lost and not paints and thing.colors.get("contrast"):
        return choose_look(stream, thing, "contrast", behind)
    if paints and (style == "contrast" or lost or stream.random() < 2 / 3):
        return style, stream.choice(paints), True
    return style, natural, False

"""Scenes: a few objects on a background, with everything known that a question may ask.

A scene is a pure function of (things, seed, split, index). It records what is where; pictures.py draws it. All lengths
are pixels of an image of SIZE x SIZE, y downwards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from samples.build.scenes.colors import PALE
from samples.build.scenes.things import STYLES, Thing

SIZE = 224
SMALL, LARGE = (46, 58), (88, 104)  # range of the longer side; far apart, so that both words are clear
MAX_LARGE = (1, 2, 2, 2, 1, 1)  # greatest number of large objects among 1, 2, ... 6: more do not fit
GAP = 4  # least distance of two objects
PHOTOS = ("bricks", "grass", "gravel", "wood", "space")
SIDES = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Background:
    """The background of a scene.

    Attributes:
        name: One of PHOTOS, or "plain".
        color: The colour of a plain background, one of PALE; None for a photo.
        offset: Where the scene's section of the photo begins, (x, y) as shares in [0, 1) of the possible range.
    """

    name: str
    color: str | None = None
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Placed:
    """An object in a scene.

    Attributes:
        thing: The object.
        style: The style of its icon.
        color: The name of its colour; None if it has no single colour.
        painted: Whether the icon is painted in this colour; False: the original icon.
        x: Its centre.
        y: Its centre.
        size: Its longer side.
        mirrored: Whether the icon is mirrored left to right.
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
        """Whether it is left of, right of, above or below another object.

        Args:
            side: One of SIDES.
            of: The other object.

        Returns:
            True: a vertical or horizontal line separates the two, and their centres are at least as far apart in this
            direction as in the other. False: its centre is not on this side. None: people would not agree.
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
        """("left" | "middle" | "right", "top" | "middle" | "bottom"), with None where it is between two of them."""
        return band(self.x, "left", "right"), band(self.y, "top", "bottom")


def band(center: int, low: str, high: str) -> str | None:
    """The part of the image that a coordinate is in: `low`, "middle" or `high`; None if it is between two of them."""
    if abs(center - SIZE / 2) < 0.1 * SIZE:
        return "middle"
    return low if center < 0.36 * SIZE else high if center > 0.64 * SIZE else None


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        split: The name of the set that it belongs to.
        index: Its number in that set.
        background: Its background.
        style: The style of all its objects; None if they differ.
        objects: Its objects.
    """

    split: str
    index: int
    background: Background
    style: str | None
    objects: tuple[Placed, ...]

    def named(self, name: str) -> list[Placed]:
        """The objects with this name."""
        return [placed for placed in self.objects if placed.name == name]

    def of_kind(self, kind: str) -> list[Placed]:
        """The objects of this kind."""
        return [placed for placed in self.objects if placed.thing.kind == kind]

    def only(self) -> list[Placed]:
        """The objects whose name occurs once, so that "the cat" is unambiguous."""
        return [placed for placed in self.objects if len(self.named(placed.name)) == 1]


def make_scene(things: Sequence[Thing], seed: int, split: str, index: int) -> Scene:
    """Makes a scene of 1 to 6 objects, which do not overlap; some may be equal.

    Args:
        things: The objects to choose from.
        seed: The seed of the data set.
        split: The name of the set that the scene belongs to.
        index: The number of the scene.
    """
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
    style = common if not mixed else None
    appearances = [choose_appearance(stream, thing, style, background.color) for thing in chosen]
    objects = tuple(
        Placed(thing, *appearance, *center, size, mirrored=stream.random() < 0.5)
        for thing, appearance, center, size in zip(chosen, appearances, centers, sizes, strict=True)
    )
    styles = {placed.style for placed in objects}
    return Scene(split, index, background, styles.pop() if len(styles) == 1 else None, objects)


def choose_background(stream: random.Random) -> Background:
    """A photo in 35 % of the scenes, otherwise a plain colour."""
    if stream.random() < 0.35:
        return Background(stream.choice(PHOTOS), None, (stream.random(), stream.random()))
    return Background("plain", stream.choice(tuple(PALE)))


def choose_things(stream: random.Random, things: Sequence[Thing], count: int) -> list[Thing]:
    """`count` objects; in half of the scenes with more than one object, one of them occurs repeatedly."""
    chosen = stream.sample(things, min(count, len(things)))
    chosen += [chosen[0]] * (count - len(chosen))
    if count > 1 and stream.random() < 0.5:
        copies = stream.randint(2, min(count, 5))
        chosen = [chosen[0]] * copies + chosen[1 : 1 + count - copies]
    kind = chosen[0].kind
    same_kind = [thing for thing in things if kind and thing.kind == kind and thing not in chosen]
    if count > 1 and same_kind and stream.random() < 0.3:  # with two animals, "the animal on the left" makes sense
        chosen[-1] = stream.choice(same_kind)
    stream.shuffle(chosen)
    return chosen


def choose_sizes(stream: random.Random, count: int) -> list[int]:
    num_large = stream.randint(0, MAX_LARGE[count - 1])
    sizes = [stream.randint(*(LARGE if number < num_large else SMALL)) for number in range(count)]
    stream.shuffle(sizes)
    return sizes


def choose_centers(stream: random.Random, sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Random centres with GAP between any two squares and to the edges; None if no free position was found."""
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


def choose_appearance(
    stream: random.Random, thing: Thing, style: str | None, background: str | None
) -> tuple[str, str | None, bool]:
    """Chooses how an object appears: a third of those that can be painted keep the original icon.

    A colour that would be invisible on the background is avoided.

    Args:
        stream: The random generator.
        thing: The object.
        style: The style of its icon; None: any.
        background: The colour of a plain background; None: a photo.

    Returns:
        `style`, `color` and `painted` of `Placed`.
    """
    style = style or stream.choice(STYLES)
    paints = [color for color in thing.colors.get(style, ()) if color != background]
    natural = thing.natural.get(style)
    invisible = natural is not None and natural == background
    if invisible and not paints and thing.colors.get("contrast"):
        return choose_appearance(stream, thing, "contrast", background)
    if paints and (style == "contrast" or invisible or stream.random() < 2 / 3):
        return style, stream.choice(paints), True
    return style, natural, False

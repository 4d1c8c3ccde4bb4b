"""Sentences about scenes: five captions of each, and statements about pairs of scenes in the format of NLVR2."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from samples.build.scenes.questions import NUMBER_WORDS, SIDE_WORDS, STYLE_ANSWERS, corners
from samples.build.scenes.scenes import SIDES, Placed, Scene, make_scene
from samples.build.scenes.things import KINDS, Thing, with_a

PAIRS = 4  # in a set; a sentence is true of two of them: NLVR2's consistency requires all four to be correct
SENTENCES = 4  # in a set
NUM_THINGS = 5  # different objects in the scenes of a set, so that the scenes have objects in common
PHOTO_WORDS = {
    "bricks": "a brick wall",
    "grass": "grass",
    "gravel": "gravel",
    "wood": "a wooden table",
    "space": "a dark sky full of stars",
}


def captions(scene: Scene, seed: int) -> list[str]:
    """Five different sentences that are true of the scene; the kinds of sentences have a fixed order."""
    stream = random.Random(f"captions/{seed}/{scene.split}/{scene.index}")
    first, second, third = (listing(scene, stream, colors) for colors in (True, False, True))
    where = where_words(scene, stream)
    sentences = [
        f"{first} on {background_words(scene)}",
        second,
        relation_words(scene, stream) or f"{where_words(scene, stream)} on {background_words(scene)}",
        in_order(scene) or f"a picture of {counted(len(scene.objects), 'object', 'objects')}: {third}",
        where,
    ]
    if scene.style is not None:
        sentences[1] = f"{with_a(STYLE_ANSWERS[scene.style])} picture of {sentences[1]}"
    return [sentence[0].upper() + sentence[1:] + "." for sentence in sentences]


def counted(number: int, one: str, many: str) -> str:
    """A number with singular or plural: "a cat", "two cats"."""
    return with_a(one) if number == 1 else f"{NUMBER_WORDS[number]} {many}"


def in_order(scene: Scene) -> str | None:
    """The objects in order, as in "from left to right: a dog, a red car and a dog".

    Returns:
        None if there is only one object, or if objects overlap horizontally.
    """
    row = sorted(scene.objects, key=lambda placed: placed.x)
    apart = all(one.x + one.size / 2 <= other.x for one, other in pairwise(row))
    return f"from left to right: {joined([with_a(full_name(p)) for p in row])}" if apart and len(row) > 1 else None


def joined(words: Sequence[str]) -> str:
    """A list as text: "a dog, a car and an owl"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def listing(scene: Scene, stream: random.Random, colors: bool) -> str:
    """The objects in random order, equal ones together, as in "a red car, two dogs and an owl"."""
    objects = stream.sample(scene.objects, len(scene.objects))
    groups = Counter((placed.thing, placed.color if colors else None) for placed in objects)
    return joined(
        [
            counted(number, " ".join(filter(None, (color, thing.name))), " ".join(filter(None, (color, thing.plural))))
            for (thing, color), number in groups.items()
        ]
    )


def background_words(scene: Scene) -> str:
    background = scene.background
    return f"{with_a(background.color)} background" if background.color else PHOTO_WORDS[background.name]


def full_name(placed: Placed) -> str:
    """The name with the colour, if there is one: "red car"."""
    return f"{placed.color} {placed.name}" if placed.color else placed.name


def relation_words(scene: Scene, stream: random.Random) -> str | None:
    """A random relation, as in "a cat to the left of a red bus"; None if no two objects have a clear one."""
    found = [
        f"{with_a(full_name(one))} {SIDE_WORDS[side]} {with_a(full_name(other))}"
        for one in scene.only()
        for other in scene.only()
        for side in SIDES
        if one is not other and one.is_side(side, other)
    ]
    return stream.choice(found) if found else None


def where_words(scene: Scene, stream: random.Random) -> str:
    """A random object with its position, as in "a large red car in the top left"; without one if none is clear."""
    size = {True: "large", False: "small"}
    found = [
        f"{with_a(f'{size[placed.large]} {full_name(placed)}')} in the {where} of the picture"
        for where, placed in corners(scene).items()
    ]
    placed = stream.choice(scene.objects)
    return stream.choice(found) if found else f"{with_a(f'{size[placed.large]} {full_name(placed)}')}"


Pair = tuple[Scene, Scene]


@dataclass(frozen=True)
class Statement:
    """A sentence about a pair of scenes.

    Attributes:
        family: The kind of sentence.
        sentence: The text.
        holds: Whether it is true of a pair; None if people would not agree.
    """

    family: str
    sentence: str
    holds: Callable[[Pair], bool | None]


@dataclass(frozen=True)
class PairSet:
    """A set of pairs of scenes with sentences.

    Attributes:
        pairs: PAIRS pairs of scenes.
        sentences: Each with its PAIRS labels, half of them True.
    """

    pairs: tuple[Pair, ...]
    sentences: tuple[tuple[str, tuple[bool, ...]], ...]


def pair_sets(things: Sequence[Thing], seed: int, split: str, number: int) -> Iterator[PairSet]:
    """Yields `number` sets; a pure function of the arguments."""
    for index in range(number):
        stream = random.Random(f"pairs/{seed}/{split}/{index}")
        attempt = 0
        while (found := pair_set(things, seed, f"{split}/{index}/{attempt}", stream)) is None:
            attempt += 1
        yield found


def pair_set(things: Sequence[Thing], seed: int, split: str, stream: random.Random) -> PairSet | None:
    """A set of random scenes; None if too few sentences are true of exactly half of its pairs."""
    topic = choose_topic(things, stream)
    scenes = [make_scene(topic, seed, split, number) for number in range(2 * PAIRS)]
    pairs = tuple(zip(scenes[::2], scenes[1::2], strict=True))
    found: dict[str, list[tuple[str, tuple[bool, ...]]]] = {}
    for statement in statements(topic):
        labels = [statement.holds(pair) for pair in pairs]
        if None not in labels and labels.count(True) == PAIRS // 2:
            found.setdefault(statement.family, []).append((statement.sentence, tuple(map(bool, labels))))
    if len(found) < SENTENCES:
        return None
    return PairSet(pairs, tuple(stream.choice(found[family]) for family in stream.sample(sorted(found), SENTENCES)))


def choose_topic(things: Sequence[Thing], stream: random.Random) -> list[Thing]:
    """A few objects, two of them of the same kind, so that "more animals in the left image" makes sense."""
    topic = stream.sample(things, min(NUM_THINGS, len(things)))
    kind = next((thing.kind for thing in topic if thing.kind), None)
    same_kind = [thing for thing in things if kind and thing.kind == kind and thing not in topic]
    return [*topic[:-1], stream.choice(same_kind)] if same_kind and len(topic) > 2 and topic[-1].kind != kind else topic


def statements(topic: Sequence[Thing]) -> Iterator[Statement]:
    """All statements about pairs of scenes of these objects."""
    kinds = sorted({thing.kind for thing in topic if thing.kind})
    for side, image in enumerate(("left", "right")):
        yield from about_one_image(topic, kinds, side, image)
    for thing in topic:
        for number in (2, 3, 4, 5):
            yield about_total(thing, number)
        yield Statement(
            "both",
            f"Both images contain {with_a(thing.name)}.",
            lambda pair, thing=thing: all(bool(scene.named(thing.name)) for scene in pair),
        )
        yield Statement(
            "one only",
            f"Exactly one of the images contains {with_a(thing.name)}.",
            lambda pair, thing=thing: sum(bool(scene.named(thing.name)) for scene in pair) == 1,
        )
        for other in topic:
            if other != thing:
                yield from about_two_things(thing, other)
    for kind in kinds:
        yield Statement(
            "more of a kind",
            f"There are more {KINDS[kind]} in the left image than in the right image.",
            lambda pair, kind=kind: len(pair[0].of_kind(kind)) > len(pair[1].of_kind(kind)),
        )
    yield Statement(
        "same number",
        "Both images contain the same number of objects.",
        lambda pair: len(pair[0].objects) == len(pair[1].objects),
    )
    yield Statement(
        "more",
        "There are more objects in the right image than in the left image.",
        lambda pair: len(pair[1].objects) > len(pair[0].objects),
    )


def about_total(thing: Thing, number: int) -> Statement:
    return Statement(
        "total",
        f"There are exactly {NUMBER_WORDS[number] if number < 7 else number} {thing.plural} in the two images.",
        lambda pair: sum(len(scene.named(thing.name)) for scene in pair) == number,
    )


def about_one_image(topic: Sequence[Thing], kinds: Sequence[str], side: int, image: str) -> Iterator[Statement]:
    for thing in topic:
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white"):
            yield Statement(
                "color",
                f"The {image} image contains {with_a(f'{color} {thing.name}')}.",
                lambda pair, name=thing.name, color=color: any_in_color(pair[side].named(name), color),
            )
        yield Statement(
            "contains",
            f"There is at least one {thing.name} in the {image} image.",
            lambda pair, name=thing.name: bool(pair[side].named(name)),
        )
    for number in (2, 3, 4, 5):
        yield Statement(
            "number",
            f"The image on the {image} shows exactly {NUMBER_WORDS[number]} objects.",
            lambda pair, number=number: len(pair[side].objects) == number,
        )
    for kind in kinds:
        yield Statement(
            "kind",
            f"The {image} image shows {with_a(kind)}.",
            lambda pair, kind=kind: bool(pair[side].of_kind(kind)),
        )


def any_in_color(found: Sequence[Placed], color: str) -> bool | None:
    """Whether one of the objects has this colour; None if it might, because it is multi-coloured."""
    if any(placed.color == color for placed in found):
        return True
    return None if any(placed.color is None for placed in found) else False


def about_two_things(one: Thing, other: Thing) -> Iterator[Statement]:
    def one_each(pair: Pair) -> bool:
        left, right = ([bool(scene.named(thing.name)) for thing in (one, other)] for scene in pair)
        return (left[0] and right[1]) or (left[1] and right[0])

    if one.name < other.name:
        text = f"One image contains {with_a(one.name)} and the other image contains {with_a(other.name)}."
        yield Statement("one each", text, one_each)
    for side in ("left", "above"):
        yield Statement(
            "relation",
            f"In one of the images {with_a(one.name)} is {SIDE_WORDS[side]} {with_a(other.name)}.",
            lambda pair, side=side: related(pair, one, other, side),
        )


def related(pair: Pair, one: Thing, other: Thing, side: str) -> bool | None:
    holds = [
        first.is_side(side, second)
        for scene in pair
        for first in scene.named(one.name)
        for second in scene.named(other.name)
    ]
    return True if True in holds else None if None in holds else False

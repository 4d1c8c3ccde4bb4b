"""Compositional questions about scenes, in the format of GQA."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from samples.build.scenes.balance import balanced
from samples.build.scenes.questions import SIDE_WORDS, absent, alone_beside, yes_no
from samples.build.scenes.scenes import SIDES, Placed, Scene
from samples.build.scenes.things import KINDS, Thing, with_a

SHARES = {  # detailed type: its share of all questions in per cent
    "existAnd": 9,
    "existOr": 7,
    "existAttrRel": 8,
    "verifyCategory": 8,
    "verifySameColor": 6,
    "chooseSide": 9,
    "chooseColor": 8,
    "chooseLarger": 7,
    "queryAttrRel": 14,
    "queryObjectRel": 12,
    "queryObjectSize": 6,
    "queryObjectColor": 6,
}


@dataclass(frozen=True)
class Composed:
    """A question about a scene.

    Attributes:
        scene: The scene.
        family: GQA's detailed type.
        text: The question.
        answer: The true answer.
        full: The answer as a sentence.
        structural: GQA's structural type.
        semantic: GQA's semantic type.
        group: The answers are balanced among the questions of a group.
        subject: The object that is asked about; None for no particular one.
    """

    scene: Scene
    family: str
    text: str
    answer: str
    full: str
    structural: str
    semantic: str
    group: str
    subject: Thing | None = None

    @property
    def image_index(self) -> int:
        """The number of the image that the question is about."""
        return self.scene.index


def gqa_questions(things: Sequence[Thing], scenes: Sequence[Scene], number: int, seed: int) -> list[Composed]:
    """Chooses `number` questions, balanced as in `vqa_questions`, in the order of the images."""
    stream = random.Random(f"gqa/{seed}/{scenes[0].split}")
    candidates = [question for scene in scenes for ask in ASK for question in ask(things, scene, stream)]
    distinct = {(question.image_index, question.text): question for question in candidates}
    chosen = balanced(list(distinct.values()), SHARES, number, stream)
    return sorted(chosen, key=lambda question: question.image_index)


def gqa_entries(questions: Sequence[Composed], image_ids: Sequence[str], first_id: int) -> dict[str, dict[str, Any]]:
    """The content of GQA's file of questions.

    Args:
        questions: The questions.
        image_ids: The id of the image of each question.
        first_id: The id of the first question; the others follow.

    Returns:
        Question id -> the question with its answer, types and groups.
    """
    return {
        f"{first_id + number:08d}": {
            "imageId": image_id,
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": question.full,
            "isBalanced": True,
            "groups": {
                "global": question.subject.kind if question.subject else None,
                "local": f"{question.structural}-{question.subject.name if question.subject else question.family}",
            },
            "types": {
                "structural": question.structural,
                "semantic": question.semantic,
                "detailed": question.family,
            },
        }
        for number, (question, image_id) in enumerate(zip(questions, image_ids, strict=True))
    }


Asked = Iterator[Composed]


def ask_logical(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    present = list(dict.fromkeys(placed.thing for placed in scene.objects))
    missing = absent(things, scene, stream, 3)
    pairs = [(one, other) for one, other in combinations(present, 2)]
    mixed = [stream.sample((one, other), 2) for one in present for other in missing[:2]]
    for first, second in [*pairs, *mixed, *combinations(missing, 2)]:
        both, one = first in present and second in present, first in present or second in present
        names = f"{with_a(first.name)} and {with_a(second.name)}"
        full = f"{'Yes' if both else 'No'}, there {'are' if both else 'are not'} both {names}."
        yield Composed(
            scene, "existAnd", f"Are there both {names}?", yes_no(both), full, "logical", "obj", "existAnd", first
        )
        names = names.replace(" and ", " or ")
        full = f"{'Yes' if one else 'No'}, there is {'either' if one else 'neither'} {names}."
        if not one:
            full = full.replace(" or ", " nor ")
        yield Composed(
            scene, "existOr", f"Is there either {names}?", yes_no(one), full, "logical", "obj", "existOr", first
        )


def ask_exist_attribute(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    """Asks for example "Is there a red car to the left of the dog?".

    If the answer is no, there is such a car elsewhere, or one of another colour there.
    """
    for placed in scene.only():
        for other in scene.only():
            if other is placed or placed.color is None:
                continue
            for side in SIDES:
                holds = placed.is_side(side, other)
                if holds is None:
                    continue
                shown = set(placed.thing.colors.get(placed.style, ())) - {placed.color}
                wrong = [stream.choice(sorted(shown))] if holds and shown else []
                for color in (placed.color, *wrong):
                    true = holds and color == placed.color
                    what = f"{with_a(f'{color} {placed.name}')} {SIDE_WORDS[side]} the {other.name}"
                    full = f"{'Yes' if true else 'No'}, there is {'' if true else 'not '}{what}."
                    yield Composed(
                        scene,
                        "existAttrRel",
                        f"Is there {what}?",
                        yes_no(true),
                        full,
                        "verify",
                        "rel",
                        f"existAttrRel {side}",
                        placed.thing,
                    )


def described(scene: Scene) -> Iterator[tuple[str, Placed]]:
    """Expressions that denote one object without its name: "large object on the left", "green object"."""
    for placed in scene.objects:
        across, down = placed.place()
        size = "large" if placed.large else "small"
        same_size = [other for other in scene.objects if other.large == placed.large]
        for where, axis in ((across, 0), (down, 1)):
            if where in ("left", "right", "top", "bottom"):
                rivals = [other for other in same_size if other.place()[axis] in (where, None)]
                if len(rivals) == 1:
                    yield f"{size} object {'on' if axis == 0 else 'at'} the {where}", placed
        colors = [other.color for other in scene.objects]
        if placed.color is not None and None not in colors and colors.count(placed.color) == 1:
            yield f"{placed.color} object", placed


def ask_described(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for words, placed in described(scene):
        family = "queryObjectSize" if " object " in words else "queryObjectColor"
        full = f"The {words} is {with_a(placed.name)}."
        yield Composed(scene, family, f"What is the {words}?", placed.name, full, "query", "obj", family, placed.thing)
        if placed.thing.kind is None:
            continue
        for kind in (placed.thing.kind, stream.choice([kind for kind in KINDS if kind != placed.thing.kind])):
            true = kind == placed.thing.kind
            full = f"{'Yes' if true else 'No'}, the {words} is {with_a(placed.name)}."
            group = f"verifyCategory {kind}"
            text = f"Is the {words} {with_a(kind)}?"
            yield Composed(scene, "verifyCategory", text, yes_no(true), full, "verify", "cat", group, placed.thing)


def ask_choose(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for placed in scene.only():
        name, (across, down) = placed.name, placed.place()
        for where, pair in ((across, ("left", "right")), (down, ("top", "bottom"))):
            if where in pair:
                prefix = "on the" if pair[0] == "left" else "at the"
                text = f"Is the {name} {prefix} {pair[0]} or {prefix} {pair[1]} of the picture?"
                full = f"The {name} is {prefix} {where} of the picture."
                yield Composed(scene, "chooseSide", text, where, full, "choose", "rel", text, placed.thing)
        shown = sorted({c for colors in placed.thing.colors.values() for c in colors} - {placed.color})
        if placed.color is not None and shown:
            first, second = stream.sample((placed.color, stream.choice(shown)), 2)
            full = f"The {name} is {placed.color}."
            group = f"chooseColor {name}"
            text = f"What color is the {name}, {first} or {second}?"
            yield Composed(scene, "chooseColor", text, placed.color, full, "choose", "attr", group, placed.thing)


def ask_compare(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for pair in combinations(scene.only(), 2):
        first, second = stream.sample(pair, 2)
        if first.large != second.large:
            larger = first if first.large else second
            text = f"Which is larger, the {first.name} or the {second.name}?"
            full = f"The {larger.name} is larger."
            yield Composed(
                scene, "chooseLarger", text, larger.name, full, "compare", "attr", "chooseLarger", larger.thing
            )
        if first.color is not None and second.color is not None:
            same = first.color == second.color
            text = f"Do the {first.name} and the {second.name} have the same color?"
            full = f"{'Yes' if same else 'No'}, the {first.name} is {first.color} and the {second.name} {second.color}."
            yield Composed(
                scene, "verifySameColor", text, yes_no(same), full, "compare", "attr", "verifySameColor", first.thing
            )


def ask_beyond(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    """Asks about an object through a relation: "What color is the animal that is to the left of the bus?"."""
    for anchor in scene.only():
        for side in SIDES:
            if (alone := alone_beside(scene, anchor, side)) is not None and alone in scene.only():
                what = f"object that is {SIDE_WORDS[side]} the {anchor.name}"
                full = f"The {what} is {with_a(alone.name)}."
                text = f"What is the {what}?"
                group = f"queryObjectRel {side}"
                yield Composed(scene, "queryObjectRel", text, alone.name, full, "query", "rel", group, alone.thing)
            for word, placed in one_on_a_side(scene, anchor, side):
                if placed.color is not None:
                    what = f"{word} that is {SIDE_WORDS[side]} the {anchor.name}"
                    full = f"The {what} is {placed.color}."
                    text = f"What color is the {what}?"
                    group = f"queryAttrRel {word}"
                    yield Composed(
                        scene, "queryAttrRel", text, placed.color, full, "query", "attr", group, placed.thing
                    )


def one_on_a_side(scene: Scene, anchor: Placed, side: str) -> Iterator[tuple[str, Placed]]:
    """Words ("animal", "object"), each with the only object that it can denote on one side of another object."""
    for word in (*KINDS, "object"):
        kind = [p for p in scene.objects if p is not anchor and word in ("object", p.thing.kind)]
        holds = [placed.is_side(side, anchor) for placed in kind]
        if holds.count(True) == 1 and None not in holds:
            yield word, kind[holds.index(True)]


ASK = (
    ask_logical,
    ask_exist_attribute,
    ask_described,
    ask_choose,
    ask_compare,
    ask_beyond,
)

"""Questions about scenes in the format of VQA v2: all possible questions, and a balanced choice of them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from samples.build.scenes.annotators import ten_answers
from samples.build.scenes.balance import balanced
from samples.build.scenes.scenes import PHOTOS, SIDES, SIZE, Placed, Scene
from samples.build.scenes.things import KINDS, Thing, with_a

SIDE_WORDS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
STYLE_ANSWERS = {"flat": "flat", "twemoji": "flat", "noto": "flat", "3d": "3d", "contrast": "two-tone"}
FAMILIES = {  # family: (its share of all questions in per cent, answer_type)
    "exist": (10, "yes/no"),
    "exist_kind": (4, "yes/no"),
    "is_color": (9, "yes/no"),
    "relation": (9, "yes/no"),
    "is_number": (4, "yes/no"),
    "is_background": (2, "yes/no"),
    "count": (6, "number"),
    "count_kind": (3, "number"),
    "count_all": (4, "number"),
    "count_color": (1, "number"),
    "color": (16, "other"),
    "background_color": (5, "other"),
    "background": (3, "other"),
    "kind": (8, "other"),
    "beside": (5, "other"),
    "corner": (8, "other"),
    "largest": (2, "other"),
    "style": (1, "other"),
}
BY_FAMILY = {"relation", "beside"}  # families whose texts hardly recur: their answers are balanced over the family
TYPES = (  # those of VQA v2's question types that occur here
    "are there",
    "how many",
    "is the",
    "is there",
    "is there a",
    "what",
    "what animal is",
    "what color is the",
    "what is",
    "what is in the",
    "what is the",
)


@dataclass(frozen=True)
class Question:
    """A question about a scene, of one of FAMILIES, with its true answer."""

    scene: Scene
    family: str
    text: str
    answer: str

    @property
    def group(self) -> str:
        """The answers are balanced among the questions of a group."""
        return self.family if self.family in BY_FAMILY else self.text

    @property
    def image_index(self) -> int:
        """The number of the image that the question is about."""
        return self.scene.index


def question_type(text: str) -> str:
    """The longest of TYPES that a question starts with, or "none of the above"."""
    words = text.lower()
    return max((kind for kind in TYPES if words.startswith(kind + " ")), key=len, default="none of the above")


def vqa_questions(things: Sequence[Thing], scenes: Sequence[Scene], number: int, seed: int) -> list[Question]:
    """Chooses questions so that all answers to a question are equally frequent.

    Args:
        things: All objects.
        scenes: The scenes of a split.
        number: How many questions; there are fewer only if the scenes do not have as many.
        seed: The seed of the data set.

    Returns:
        The questions in the order of the images, which have about equally many questions each.
    """
    stream = random.Random(f"vqa/{seed}/{scenes[0].split}")
    candidates = [question for scene in scenes for question in all_questions(things, scene, stream)]
    chosen = balanced(candidates, {family: share for family, (share, _) in FAMILIES.items()}, number, stream)
    return sorted(chosen, key=lambda question: question.scene.index)


def vqa_annotations(questions: Sequence[Question], image_ids: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """Yields VQA v2's annotations, each with the text of its question.

    Args:
        questions: The questions, those about the same image in succession.
        image_ids: The id of the image of each question.
        seed: The seed of the data set.
    """
    stream = random.Random(f"annotators/{seed}/{questions[0].scene.split}")
    number, previous_id = 0, None
    for question, image_id in zip(questions, image_ids, strict=True):
        number = number + 1 if image_id == previous_id else 0
        previous_id = image_id
        answer_type = FAMILIES[question.family][1]
        answers = ten_answers(stream, question.answer, answer_type, confusable_answers(question))
        yield {
            "question_id": image_id * 1000 + number,
            "image_id": image_id,
            "question": question.text,
            "question_type": question_type(question.text),
            "answer_type": answer_type,
            "multiple_choice_answer": question.answer,
            "answers": answers,
        }


def confusable_answers(question: Question) -> tuple[str, ...]:
    """Plausible wrong answers: the names of other objects in the image, or the kind of the right one."""
    placed = [placed for placed in question.scene.objects if placed.name == question.answer]
    kinds = [thing.thing.kind for thing in placed if thing.thing.kind]
    others = [other.name for other in question.scene.objects if other.name != question.answer]
    return (*dict.fromkeys(others + kinds), "nothing")


def all_questions(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Iterator[Question]:
    """All questions about a scene that have one true answer; for absent objects, a few at random."""
    for family, ask in ASK.items():
        for text, answer in ask(things, scene, stream):
            yield Question(scene, family, text, answer)


Asked = Iterator[tuple[str, str]]


def yes_no(holds: bool) -> str:
    return "yes" if holds else "no"


def ask_exist(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    present = {placed.name: placed.thing for placed in scene.objects}
    for thing in present.values():
        yield f"Is there {with_a(thing.name)} in the picture?", "yes"
    for thing in absent(things, scene, stream, 6):
        yield f"Is there {with_a(thing.name)} in the picture?", "no"


def absent(things: Sequence[Thing], scene: Scene, stream: random.Random, number: int) -> list[Thing]:
    """Objects that are not in the scene, half of them of a kind that is, so that they are harder to rule out."""
    names = {placed.name for placed in scene.objects}
    kinds = {placed.thing.kind for placed in scene.objects} - {None}
    others = [thing for thing in things if thing.name not in names]
    same_kind = [thing for thing in others if thing.kind in kinds]
    first = stream.sample(same_kind, min(number // 2, len(same_kind)))
    rest = [thing for thing in others if thing not in first]
    return first + stream.sample(rest, min(number - len(first), len(rest)))


def ask_exist_kind(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for kind in KINDS:
        yield f"Is there {with_a(kind)} in the picture?", yes_no(bool(scene.of_kind(kind)))


def ask_is_color(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for placed in colored(scene):
        yield f"Is the {placed.name} {placed.color}?", "yes"
        others = {c for colors in placed.thing.colors.values() for c in colors} | set(placed.thing.natural.values())
        for color in stream.sample(sorted(others - {placed.color}), min(2, len(others - {placed.color}))):
            yield f"Is the {placed.name} {color}?", "no"


def colored(scene: Scene) -> list[Placed]:
    """The objects with a unique name and a named colour."""
    return [placed for placed in scene.only() if placed.color is not None]


def ask_relation(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for first, second in permutations(scene.only(), 2):
        for side in SIDES:
            if (holds := first.is_side(side, second)) is not None:
                yield f"Is the {first.name} {SIDE_WORDS[side]} the {second.name}?", yes_no(holds)


def ask_is_number(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for thing in dict.fromkeys(placed.thing for placed in scene.objects):
        number = len(scene.named(thing.name))
        for asked in {number, stream.choice((2, 3, 4))} - {1}:
            yield f"Are there {NUMBER_WORDS[asked]} {thing.plural}?", yes_no(asked == number)


def ask_is_background(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    if (color := scene.background.color) is not None:
        for asked in (color, *stream.sample(sorted({"red", "blue", "green", "yellow", "pink", "gray"} - {color}), 2)):
            yield f"Is the background {asked}?", yes_no(asked == color)


def ask_count(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for thing in dict.fromkeys(placed.thing for placed in scene.objects):
        yield f"How many {thing.plural} are there?", str(len(scene.named(thing.name)))
    for thing in absent(things, scene, stream, 1):
        yield f"How many {thing.plural} are there?", "0"


def ask_count_kind(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for kind, plural in KINDS.items():
        yield f"How many {plural} are there?", str(len(scene.of_kind(kind)))


def ask_count_all(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    yield "How many objects are there?", str(len(scene.objects))
    yield "How many things are in the picture?", str(len(scene.objects))


def ask_count_color(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    colors = [placed.color for placed in scene.objects]
    if None not in colors:
        for color in ("red", "green", "blue", "yellow", "purple", "pink", "orange"):
            yield f"How many {color} objects are there?", str(colors.count(color))


def ask_color(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for placed in colored(scene):
        yield f"What color is the {placed.name}?", placed.color or ""


def ask_background_color(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    if scene.background.color is not None:
        yield "What color is the background?", scene.background.color


def ask_background(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    if scene.background.name in PHOTOS:
        yield "What is in the background?", scene.background.name


def ask_kind(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for kind in KINDS:
        if len({placed.name for placed in scene.of_kind(kind)}) == 1:
            yield f"What {kind} is in the picture?", scene.of_kind(kind)[0].name


def ask_beside(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for placed in scene.only():
        for side in SIDES:
            if (answer := alone_beside(scene, placed, side)) is not None:
                yield f"What is {SIDE_WORDS[side]} the {placed.name}?", answer.name


def alone_beside(scene: Scene, placed: Placed, side: str) -> Placed | None:
    """The only object on one side of another; None if there is none, more than one, or a doubtful one."""
    others = [other for other in scene.objects if other is not placed]
    holds = [other.is_side(side, placed) for other in others]
    return others[holds.index(True)] if holds.count(True) == 1 and None not in holds else None


def ask_corner(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    for where, placed in corners(scene).items():
        yield f"What is in the {where}?", placed.name


def corners(scene: Scene) -> dict[str, Placed]:
    """Position ("top left", ..., "middle") -> the only object there, with no other centre in or near that part."""
    found = {}
    for placed in scene.objects:
        across, down = placed.place()
        others = [other for other in scene.objects if other is not placed]
        if across == down == "middle":
            where, rivals = "middle", [is_central(other) for other in others]
        elif across in ("left", "right") and down in ("top", "bottom"):
            where, rivals = f"{down} {across}", [is_near(other, across, down) for other in others]
        else:
            continue
        if not any(rivals):
            found[where] = placed
    return found


def is_near(placed: Placed, across: str, down: str) -> bool:
    """Whether a centre is in a quarter of the image or at most a tenth of the image away from it."""
    x = placed.x if across == "left" else SIZE - placed.x
    y = placed.y if down == "top" else SIZE - placed.y
    return x < 0.6 * SIZE and y < 0.6 * SIZE


def is_central(placed: Placed) -> bool:
    """Whether a centre is in the middle half along both sides."""
    return max(abs(placed.x - SIZE / 2), abs(placed.y - SIZE / 2)) < SIZE / 4


def ask_largest(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    large = [placed for placed in scene.objects if placed.large]
    if len(large) == 1 and len(scene.objects) > 1:
        yield "What is the largest object?", large[0].name


def ask_style(things: Sequence[Thing], scene: Scene, stream: random.Random) -> Asked:
    if scene.style is not None and any(placed.large for placed in scene.objects):
        yield "What style are the icons?", STYLE_ANSWERS[scene.style]


ASK = {
    "exist": ask_exist,
    "exist_kind": ask_exist_kind,
    "is_color": ask_is_color,
    "relation": ask_relation,
    "is_number": ask_is_number,
    "is_background": ask_is_background,
    "count": ask_count,
    "count_kind": ask_count_kind,
    "count_all": ask_count_all,
    "count_color": ask_count_color,
    "color": ask_color,
    "background_color": ask_background_color,
    "background": ask_background,
    "kind": ask_kind,
    "beside": ask_beside,
    "corner": ask_corner,
    "largest": ask_largest,
    "style": ask_style,
}

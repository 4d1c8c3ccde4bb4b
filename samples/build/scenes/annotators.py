"""Ten people who answer a question of which the true answer is known: mostly right, in words of their own."""

import random
from collections import Counter

__all__ = ["NUM_ANNOTATORS", "ten_answers"]

NUM_ANNOTATORS = 10
CARE = ((0.7, 0.97), (0.22, 0.85), (0.08, 0.55))  # share of the questions, share of answers to them that are right
OWN_WORDS = 0.12  # share of right answers that say it in another way, where there is one
SURE = {True: (0.92, 0.07, 0.01), False: (0.3, 0.5, 0.2)}  # of a right and a wrong answer: yes, maybe, no
OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "bricks": ("brick wall", "brick"),
    "car": ("automobile",),
    "clock": ("alarm clock",),
    "doughnut": ("donut",),
    "gift": ("present",),
    "grass": ("lawn", "green grass"),
    "gravel": ("stones", "rocks"),
    "gray": ("grey",),
    "hamburger": ("burger",),
    "hat": ("top hat",),
    "motorcycle": ("motorbike",),
    "purple": ("violet",),
    "rabbit": ("bunny",),
    "sailboat": ("boat", "sail boat"),
    "shirt": ("t shirt", "t-shirt"),
    "space": ("stars", "sky"),
    "telephone": ("phone",),
    "television": ("tv",),
    "two-tone": ("two tone",),
    "wood": ("table", "wooden table"),
    **{
        str(number): (word,)
        for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven"))
    },
}
LOOKS_LIKE: dict[str, tuple[str, ...]] = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "gold"),
    "green": ("blue", "teal"),
    "blue": ("purple", "light blue"),
    "purple": ("blue", "pink"),
    "pink": ("purple", "red"),
    "black": ("gray", "dark gray"),
    "white": ("gray", "black"),
    "gray": ("white", "blue"),
    "flat": ("cartoon", "3d"),
    "3d": ("flat", "cartoon"),
    "two-tone": ("flat", "cartoon"),
    "grass": ("moss", "leaves"),
    "gravel": ("concrete", "wall"),
    "bricks": ("floor", "wall"),
    "wood": ("wall", "floor"),
    "space": ("night", "black"),
}


def ten_answers(
    stream: random.Random, truth: str, answer_type: str, alike: tuple[str, ...] = ()
) -> list[dict[str, str | int]]:
    """The `answers` of VQA v2's annotations. The truth is the most frequent of them.

    alike: what the thing may be taken for, where neither its colour nor its number is asked.
    """
    care = stream.choices([care for _, care in CARE], weights=[share for share, _ in CARE])[0]
    while True:
        said = [say(stream, truth, answer_type, alike, care) for _ in range(NUM_ANNOTATORS)]
        (first, most), *others = Counter(said).most_common(2)
        if first == truth and most >= 2 and (not others or others[0][1] < most):
            break
    return [
        {
            "answer": answer,
            "answer_confidence": stream.choices(("yes", "maybe", "no"), weights=SURE[answer == truth])[0],
            "answer_id": number,
        }
        for number, answer in enumerate(said, start=1)
    ]


def say(stream: random.Random, truth: str, answer_type: str, alike: tuple[str, ...], care: float) -> str:
    if stream.random() < care:
        return stream.choice(OTHER_WORDS[truth]) if truth in OTHER_WORDS and stream.random() < OWN_WORDS else truth
    if answer_type == "yes/no":
        return "no" if truth == "yes" else "yes"
    if answer_type == "number":
        return str(max(int(truth) + stream.choice((-1, 1, 1, 2)), 0))
    return stream.choice(LOOKS_LIKE.get(truth, alike) or ("nothing",))

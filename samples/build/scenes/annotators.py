"""Ten simulated annotators who answer a question with a known answer: mostly correctly, sometimes in other words."""

import random
from collections import Counter

NUM_ANNOTATORS = 10
ACCURACIES = ((0.7, 0.97), (0.22, 0.85), (0.08, 0.55))  # share of the questions, share of correct answers to them
SYNONYM_SHARE = 0.12  # share of correct answers that use another word, where there is one
CONFIDENCE = {True: (0.92, 0.07, 0.01), False: (0.3, 0.5, 0.2)}  # weights of yes, maybe, no for a right, wrong answer
SYNONYMS: dict[str, tuple[str, ...]] = {
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
CONFUSED_WITH: dict[str, tuple[str, ...]] = {
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
    stream: random.Random, truth: str, answer_type: str, confusable: tuple[str, ...] = ()
) -> list[dict[str, str | int]]:
    """Draws the `answers` of one of VQA v2's annotations; the most frequent of them is the truth.

    Args:
        stream: The random generator.
        truth: The true answer.
        answer_type: VQA v2's type: "yes/no", "number" or "other".
        confusable: Wrong answers for an object that is confused with another; not used for colours and numbers.
    """
    accuracy = stream.choices([accuracy for _, accuracy in ACCURACIES], weights=[share for share, _ in ACCURACIES])[0]
    while True:
        answers = [one_answer(stream, truth, answer_type, confusable, accuracy) for _ in range(NUM_ANNOTATORS)]
        (first, most), *others = Counter(answers).most_common(2)
        if first == truth and most >= 2 and (not others or others[0][1] < most):
            break
    return [
        {
            "answer": answer,
            "answer_confidence": stream.choices(("yes", "maybe", "no"), weights=CONFIDENCE[answer == truth])[0],
            "answer_id": number,
        }
        for number, answer in enumerate(answers, start=1)
    ]


def one_answer(
    stream: random.Random, truth: str, answer_type: str, confusable: tuple[str, ...], accuracy: float
) -> str:
    """The answer of one annotator, who is right with probability `accuracy`."""
    if stream.random() < accuracy:
        return stream.choice(SYNONYMS[truth]) if truth in SYNONYMS and stream.random() < SYNONYM_SHARE else truth
    if answer_type == "yes/no":
        return "no" if truth == "yes" else "yes"
    if answer_type == "number":
        return str(max(int(truth) + stream.choice((-1, 1, 1, 2)), 0))
    return stream.choice(CONFUSED_WITH.get(truth, confusable) or ("nothing",))

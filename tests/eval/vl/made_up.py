"""Made-up answers with references, the same on every machine, for comparisons with official scripts.

Blanks, percent signs, units, several lines, other alphabets, boxes, and what models say around an answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

NUM = 2000
TEXTS = (
    *(
        "",
        " ",
        "yes",
        "No",
        "coca cola",
        "Coca-Cola",
        "the red car",
        "a dog",
        "dog",
        "two",
        "2",
        "none",
        "0",
        "0.0",
        "O'Neil's",
    ),
    *(
        "12%",
        "12 %",
        "0.12",
        "12",
        "1,200",
        "1200",
        "$1,200.50",
        "3.14159",
        "-7",
        "1e3",
        "+5",
        ".5",
        "7.",
        "100%",
        "0%",
        "%",
    ),
    *("2010", "2019", "in 1999", "12 kg", "5 km/h", "10:45 am", "May 4, 2007", "04/05/2007", "42 North Main Street"),
    *(
        "first line\nsecond line",
        "tab\there",
        "double  space",
        " padded ",
        "déjà vu",
        "Straße",
        "İstanbul",
        "ΟΔΟΣ",
        "москва",
    ),
    *(
        "東京",
        "\uff26\uff35\uff2c\uff2c\u3000\uff57\uff49\uff44\uff54\uff48",
        "مرحبا",
        "हिन्दी",
        "👍🏽 ok",
        "x^{2} + y^2",
        "\\frac { a } { b }",
        "don't",
        "dont",
        "it's",
        "let's go",
    ),
    *(
        "university of california",
        "national institute of standards and technology",
        "b & w",
        "A",
        "b",
        "nan",
        "inf",
        "1_000",
    ),
)
AROUND = (
    *(
        "{}",
        "{}",
        "{}",
        "{}.",
        " {} ",
        "{}\n",
        "The answer is {}.",
        "The answer is {}",
        "Answer: {}",
        "answer: {}!",
        "**{}**",
    ),
    *(
        "It is {}",
        "so {} = {}",
        "I think it could be {}, thus\nthe final answer is {}",
        '"{}"',
        "({})",
        "{}, I am sure",
        "{};",
    ),
)
LETTER_FORMS = (
    *(
        "{}",
        "{}.",
        "({})",
        "{})",
        "{}:",
        "{}. {text}",
        "({}) {text}",
        " {} ",
        "{}\n",
        "{}\nBecause it is {text}.",
        "{text}",
    ),
    *("The answer is {}.", "The answer is {}", "the correct answer is **{}**.", "Answer: {}", "Answer: {} or {other}."),
    *(
        "It is not {other} but {}",
        "Of ({other}) and ({}), I would say it is the second one",
        "I see {text} in this picture, clearly",
    ),
    *(
        "{lower}",
        "{}{other}",
        "Z",
        "",
        "none of them",
        "Sorry, I can't help with images of people yet.",
        "A cat is in it, so {}",
    ),
    *(
        "'{}'",
        "{},",
        "?{}!",
        "The options {other} and {} both say that, more or less, and so on",
        "Answer: {text}",
        "{} {other}",
    ),
    *(
        "Failed to obtain answer via API",
        "The answer is {other}. The answer is {}.",
        "I would choose the option {text} here.",
    ),
)
SAID = (
    *(
        "yes",
        "Yes",
        "Yes.",
        "No",
        "no",
        "No.",
        "no,",
        "NO",
        "not",
        "Yes, there is a {} in it.",
        "No, there is no {}.",
        "There is not.",
    ),
    *(
        "No\n",
        "Yes\nNo",
        "There is. No doubt",
        "I see none",
        "",
        " no",
        "Not at all",
        "It isn't",
        "Nope",
        "the {} is not there",
        "yes no",
    ),
)
BOX_FORMS = (
    *(
        "<box>({a},{b}),({c},{d})</box>",
        "<|box_start|>({a},{b}),({c},{d})<|box_end|>",
        "({a}, {b}), ({c}, {d})",
        "({a},{b}),({c})",
    ),
    *(
        "[{e}, {f}, {g}, {h}]",
        "The box is [{e},{f},{g},{h}].",
        "<box>[[{a}, {b}, {c}, {d}]]</box>",
        "nothing",
        "",
        "[{e}, {f}, {g}]",
    ),
)


class Source(random.Random):
    """Draws by `random` alone, whose numbers are the same in every version of Python."""

    def number(self, below: int) -> int:
        return int(self.random() * below)

    def pick(self, of: Sequence):
        return of[self.number(len(of))]


@dataclass(frozen=True)
class MadeUp:
    """One answer, with what it is compared with."""

    prediction: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    letter: str = ""
    kind: str = ""
    box: tuple[float, float, float, float] = (0, 0, 1, 1)  # in pixels
    size: tuple[int, int] = (1, 1)


def open_answers(seed: int, references: int | None = None) -> list[MadeUp]:
    """Answers in words and numbers, near to one of their references or not."""
    draw = Source(seed)
    rows = []
    for _ in range(NUM):
        count = references or 1 + draw.number(3)
        few = [draw.pick(TEXTS) for _ in range(1 + draw.number(3))]
        known = tuple(_changed(draw, draw.pick(few)) if draw.random() < 0.3 else draw.pick(few) for _ in range(count))
        said = draw.pick(known) if draw.random() < 0.8 else draw.pick(TEXTS)
        said = draw.pick(AROUND).replace("{}", said) if draw.random() < 0.4 else _changed(draw, said)
        rows.append(MadeUp(said, known, kind="HME100k" if draw.random() < 0.1 else "IIIT5K"))
    return rows


def sentences(seed: int) -> list[MadeUp]:
    """Sentences of few words, which occur in many of them in another order, in letters a to z."""
    draw = Source(seed)
    words = ("the", "The", "a", "bus", "bus,", "red-brown", "is", "isn't", "on", "street_2", "2.5", "--", "TWO", "two.")

    def sentence() -> str:
        return draw.pick((" ", "  ", "\n")).join(draw.pick(words) for _ in range(draw.number(30)))

    rows = []
    for _ in range(NUM):
        known = tuple(sentence() for _ in range(1 + draw.number(3)))
        start = draw.number(9)
        rows.append(MadeUp(draw.pick((sentence(), draw.pick(known)[start:] + sentence())), known))
    return rows


def _changed(draw: Source, text: str) -> str:
    """A text with another case, more space, other characters, or another number."""
    how = draw.number(8)
    if how == 0:
        return text.upper()
    if how == 1:
        return text.replace(" ", "  ") + " "
    if how == 2:
        for _ in range(1 + draw.number(3)):
            place = draw.number(len(text) + 1)
            text = text[:place] + draw.pick("aeiou 1.,é") + text[place + draw.number(2) :]
        return text
    if how == 3:
        place = draw.number(len(text) + 1)
        return text[:place] + "\n" + text[place:]
    if how == 4 and text.strip("%").replace(".", "", 1).isdecimal():
        sign = "%" * text.endswith("%")
        return f"{float(text.strip('%')) * (0.93 + draw.number(14) / 100):.4g}{sign}"
    return text.title() if how == 5 else text


def choices(seed: int, most: int = 5) -> list[MadeUp]:
    """Answers to questions with two options or more."""
    draw = Source(seed)
    texts = [text.strip() for text in TEXTS if text.strip() and "\n" not in text]
    rows = []
    for _ in range(NUM):
        options = tuple(draw.pick(texts) for _ in range(2 + draw.number(most - 1)))
        letters = ascii_uppercase[: len(options)]
        letter, named, other = (draw.pick(letters) for _ in range(3))
        named = letter if draw.random() < 0.5 else named
        text = options[letters.index(named)]
        said = draw.pick(LETTER_FORMS).replace("{}", named).replace("{lower}", named.lower()).replace("{other}", other)
        rows.append(MadeUp(said.replace("{text}", text), options=options, letter=letter))
    return rows


def yes_or_no(seed: int) -> list[MadeUp]:
    """Answers to questions of yes or no."""
    draw = Source(seed)
    return [MadeUp(draw.pick(SAID).replace("{}", draw.pick(TEXTS)), (draw.pick(("yes", "no")),)) for _ in range(NUM)]


def true_or_false(seed: int) -> list[tuple[str, MadeUp]]:
    """Answers about pairs of images with their ids: up to four pairs of a sentence, two sentences of a set."""
    draw = Source(seed)
    said = ("True", "true", "TRUE", "False", "false", "false ", "yes", "", "true.", "Trues", "\uff54rue")
    names = [f"dev-{number // 8}-{number % 4}-{number // 4 % 2}" for number in range(NUM)]
    rows = []
    for name in names:
        right = draw.pick(("True", "False"))
        rows.append((name, MadeUp(right if draw.random() < 0.7 else draw.pick(said), (right,))))
    return rows


def boxed(seed: int) -> list[MadeUp]:
    """Boxes as models write them, near to the right one or not."""
    draw = Source(seed)
    rows = []
    for _ in range(NUM):
        width, height = 100 + draw.number(900), 100 + draw.number(900)
        x, y = draw.number(width - 40), draw.number(height - 40)
        box = (x, y, x + 10 + draw.number(width - x - 10), y + 10 + draw.number(height - y - 10))
        moved = [value + draw.number(41) - 20 for value in box] if draw.random() < 0.8 else [0, 0, 0, 0]
        shares = [value / (width, height)[place % 2] for place, value in enumerate(moved)]
        said = draw.pick(BOX_FORMS).format(
            **dict(zip("abcd", [round(1000 * share) for share in shares], strict=True)),
            **dict(zip("efgh", [f"{share:.3f}" for share in shares], strict=True)),
        )
        rows.append(MadeUp(said, box=box, size=(width, height)))
    return rows

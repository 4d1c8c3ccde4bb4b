"""Questions, sentences and captions of scenes: each is true of its scene, and answers cannot be guessed.

The answers are checked by parsing the sentences; these parsers share no code with the generator.
"""

import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples.build.scenes.annotators import SYNONYMS, ten_answers
from samples.build.scenes.balance import balanced
from samples.build.scenes.gqa import gqa_entries, gqa_questions
from samples.build.scenes.questions import (
    FAMILIES,
    Question,
    all_questions,
    question_type,
    vqa_annotations,
    vqa_questions,
)
from samples.build.scenes.scenes import Background, Placed, Scene, make_scene
from samples.build.scenes.sentences import captions, pair_sets
from samples.build.tests.scene_things import SHAPES, some_things

THINGS = some_things()
WORDS = {thing.name: thing.name for thing in THINGS} | {thing.plural: thing.name for thing in THINGS}
KIND_NAMES = {"animal": "animal", "fruit": "fruit", "tool": "tool", "flower": "flower", "vegetable": "vegetable"}
KIND_NAMES |= {"vehicle": "vehicle", "instrument": "instrument", "ball": "ball"}
KIND_WORDS = KIND_NAMES | {f"{kind}s": kind for kind in KIND_NAMES}
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SIDES = r"(to the left of|to the right of|above|below)"


def scenes(split: str, number: int) -> list[Scene]:
    return [make_scene(THINGS, 3, split, index) for index in range(number)]


def beyond(one: Placed, other: Placed, words: str) -> float:
    """How many pixels a centre is beyond another in a direction."""
    ahead = {
        "to the left of": other.x - one.x,
        "to the right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }
    return ahead[words]


def the(scene: Scene, name: str) -> Placed:
    (found,) = [placed for placed in scene.objects if placed.name == name]
    return found


def count(scene: Scene, words: str) -> int:
    """The number of objects that match words such as "discs", "animals", "red objects" or "things"."""
    color, _, what = words.rpartition(" ")
    return sum(
        bool(
            what in ("objects", "things")
            or {WORDS.get(what), KIND_WORDS.get(what)} & ({placed.name, placed.thing.kind} - {None})
        )
        and color in ("", placed.color)
        for placed in scene.objects
    )


def true_answer(scene: Scene, text: str) -> str:
    """The answer to a VQA question, from its text."""
    yes_no = {True: "yes", False: "no"}
    if match := re.fullmatch(r"Is there an? (\w+) in the picture\?", text):
        return yes_no[count(scene, match[1]) > 0]
    if match := re.fullmatch(r"Is the background (\w+)\?", text):
        return yes_no[scene.background.color == match[1]]
    if match := re.fullmatch(rf"Is the (\w+) {SIDES} the (\w+)\?", text):
        ahead = beyond(the(scene, match[1]), the(scene, match[3]), match[2])
        assert ahead <= 0 or ahead > 40  # there are no doubtful questions
        return yes_no[ahead > 0]
    if match := re.fullmatch(r"Is the (\w+) (\w+)\?", text):
        return yes_no[the(scene, match[1]).color == match[2]]
    if match := re.fullmatch(r"Are there (\w+) (\w+)\?", text):
        return yes_no[count(scene, match[2]) == NUMBERS[match[1]]]
    if match := re.fullmatch(r"How many (.+) are (there|in the picture)\?", text):
        return str(count(scene, match[1]))
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return scene.background.color if match[1] == "background" else the(scene, match[1]).color  # type: ignore[return-value]
    if text == "What is in the background?":
        return scene.background.name
    if text == "What style are the icons?":
        (style,) = {placed.style for placed in scene.objects}
        return {"3d": "3d", "contrast": "two-tone"}.get(style, "flat")
    if text == "What is the largest object?":
        first, second = sorted(scene.objects, key=lambda placed: -placed.size)[:2]
        assert first.size > 1.4 * second.size
        return first.name
    if match := re.fullmatch(r"What is in the (top|bottom) (left|right)\?", text):
        inside = [
            p for p in scene.objects if (p.x < 112) == (match[2] == "left") and (p.y < 112) == (match[1] == "top")
        ]
    elif text == "What is in the middle?":
        inside = [p for p in scene.objects if abs(p.x - 112) < 23 and abs(p.y - 112) < 23]
    elif match := re.fullmatch(rf"What is {SIDES} the (\w+)\?", text):
        inside = [p for p in scene.objects if beyond(p, the(scene, match[2]), match[1]) > 0]
    else:
        match = re.fullmatch(r"What (\w+) is in the picture\?", text)
        assert match, text
        return " ".join({p.name for p in scene.objects if p.thing.kind == match[1]})
    (only,) = inside
    return only.name


@given(st.integers(0, 10**6))
def test_every_answer_is_true(index):
    scene = make_scene(THINGS, 0, "truth", index)
    questions = list(all_questions(THINGS, scene, random.Random(index)))
    assert len(questions) == len({question.text for question in questions})
    for question in questions:
        assert question.answer == true_answer(scene, question.text), (question.text, scene.objects)


def test_there_are_questions_of_every_family():
    chosen = vqa_questions(THINGS, scenes("all", 200), 2000, 0)
    assert {question.family for question in chosen} == set(FAMILIES)
    assert chosen == vqa_questions(THINGS, scenes("all", 200), 2000, 0)
    assert chosen != vqa_questions(THINGS, scenes("all", 200), 2000, 1)


def test_answers_are_balanced_within_every_text():
    chosen = vqa_questions(THINGS, scenes("balance", 300), 1500, 0)
    by_group: dict[str, Counter[str]] = defaultdict(Counter)
    for question in chosen:
        by_group[question.group][question.answer] += 1
    for group, answers in by_group.items():
        most = answers.most_common(2)
        assert len(most) == 2, group
        assert most[0][1] == most[1][1], (group, answers)
    per_image = Counter(question.scene.index for question in chosen)
    assert len(per_image) > 290
    assert max(per_image.values()) < 15


def test_balanced_takes_answers_in_equal_numbers_and_spreads_them_over_images():
    scene = scenes("one", 1)[0]
    others = [Scene("t", index, Background("plain", "red"), None, scene.objects) for index in range(30)]
    candidates = [Question(other, "exist", "Is it?", "yes" if other.index < 20 else "no") for other in others]
    candidates += [Question(other, "count", "How many?", "3") for other in others]  # a single answer: never chosen
    chosen = balanced(candidates, {"exist": 50, "count": 50}, 100, random.Random(0))
    assert Counter((question.text, question.answer) for question in chosen) == {
        ("Is it?", "yes"): 10,
        ("Is it?", "no"): 10,
    }
    assert max(Counter(question.scene.index for question in chosen).values()) == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("What color is the dog?", "what color is the"),
        ("What is in the top left?", "what is in the"),
        ("What is above the cat?", "what is"),
        ("What animal is in the picture?", "what animal is"),
        ("What fruit is in the picture?", "what"),
        ("Is there an owl in the picture?", "is there"),
        ("Is there a dog in the picture?", "is there a"),
        ("How many dogs are there?", "how many"),
        ("Which is larger?", "none of the above"),
    ],
)
def test_question_type(text, kind):
    assert question_type(text) == kind


def test_annotations_have_the_format_of_vqa():
    chosen = vqa_questions(THINGS, scenes("rows", 60), 300, 0)
    ids = [question.scene.index + 1 for question in chosen]
    rows = list(vqa_annotations(chosen, ids, 0))
    assert rows == list(vqa_annotations(chosen, ids, 0))
    assert len({row["question_id"] for row in rows}) == len(rows)
    for row, question, image_id in zip(rows, chosen, ids, strict=True):
        assert (row["image_id"], row["question"]) == (image_id, question.text)
        assert row["question_id"] // 1000 == image_id
        assert [answer["answer_id"] for answer in row["answers"]] == list(range(1, 11))
        answers = Counter(answer["answer"] for answer in row["answers"])
        assert row["multiple_choice_answer"] == question.answer == answers.most_common(1)[0][0]
        assert {answer["answer_confidence"] for answer in row["answers"]} <= {"yes", "maybe", "no"}
    assert {row["answer_type"] for row in rows} == {"yes/no", "number", "other"}


@pytest.mark.parametrize(
    ("truth", "answer_type"), [("yes", "yes/no"), ("2", "number"), ("red", "other"), ("car", "other")]
)
def test_annotators_mostly_agree_and_are_sometimes_wrong(truth, answer_type):
    stream = random.Random(0)
    drawn = [[a["answer"] for a in ten_answers(stream, truth, answer_type, ("bus",))] for _ in range(300)]
    right = [sum(answer in (truth, *SYNONYMS.get(truth, ())) for answer in answers) for answers in drawn]
    assert 8.5 < sum(right) / len(right) < 9.8
    assert any(len(set(answers)) == 1 for answers in drawn)
    assert any(number < 7 for number in right)
    assert all(max(Counter(answers).values()) == answers.count(truth) for answers in drawn)


def gqa_truth(scene: Scene, text: str) -> str | None:
    """The answer to a GQA question, from its text."""
    names, yes_no = {placed.name for placed in scene.objects}, {True: "yes", False: "no"}
    if match := re.fullmatch(r"Are there both an? (\w+) and an? (\w+)\?", text):
        return yes_no[match[1] in names and match[2] in names]
    if match := re.fullmatch(r"Is there either an? (\w+) or an? (\w+)\?", text):
        return yes_no[match[1] in names or match[2] in names]
    if match := re.fullmatch(rf"Is there an? (\w+) (\w+) {SIDES} the (\w+)\?", text):
        one, other = the(scene, match[2]), the(scene, match[4])
        return yes_no[one.color == match[1] and beyond(one, other, match[3]) > 0]
    if match := re.fullmatch(r"Which is larger, the (\w+) or the (\w+)\?", text):
        return max((the(scene, match[1]), the(scene, match[2])), key=lambda placed: placed.size).name
    if match := re.fullmatch(r"Do the (\w+) and the (\w+) have the same color\?", text):
        return yes_no[the(scene, match[1]).color == the(scene, match[2]).color]
    if match := re.fullmatch(r"What color is the (\w+), (\w+) or (\w+)\?", text):
        assert the(scene, match[1]).color in match.groups()
        return the(scene, match[1]).color
    if match := re.fullmatch(rf"What (is|color is) the (\w+) that is {SIDES} the (\w+)\?", text):
        anchor = the(scene, match[4])
        kind = [p for p in scene.objects if p is not anchor and match[2] in ("object", p.thing.kind)]
        (one,) = [placed for placed in kind if beyond(placed, anchor, match[3]) > 0]
        return one.name if match[1] == "is" else one.color
    if match := re.fullmatch(
        r"Is the (\w+) (?:on|at) the (?:left|top) or (?:on|at) the (right|bottom) of the picture\?", text
    ):
        placed = the(scene, match[1])
        return {"right": ("left", "right"), "bottom": ("top", "bottom")}[match[2]][
            (placed.x if match[2] == "right" else placed.y) > 112
        ]
    match = re.fullmatch(r"(?:What is|Is) the (large|small) object (?:on|at) the (\w+?)(?: an? (\w+))?\?", text)
    if match is None:
        match = re.fullmatch(r"(?:What is|Is) the (\w+) object( )?(?:an? (\w+))?\?", text)
        assert match, text
        (one,) = [placed for placed in scene.objects if placed.color == match[1]]
    else:
        ahead = {
            "left": lambda p: p.x < 86,
            "right": lambda p: p.x > 138,
            "top": lambda p: p.y < 86,
            "bottom": lambda p: p.y > 138,
        }
        (one,) = [p for p in scene.objects if p.large == (match[1] == "large") and ahead[match[2]](p)]
    return one.name if match[3] is None else yes_no[one.thing.kind == match[3]]


def test_gqa_answers_are_true_and_balanced():
    images = scenes("gqa", 250)
    chosen = gqa_questions(THINGS, images, 2000, 0)
    assert {question.family for question in chosen} == {
        question.family for question in gqa_questions(THINGS, images, 400, 1)
    }
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for question in chosen:
        assert question.answer == gqa_truth(question.scene, question.text), (question.text, question.scene.objects)
        assert question.answer in question.full.lower()
        groups[question.group][question.answer] += 1
    for group, answers in groups.items():
        (_, most), (_, second) = answers.most_common(2)
        assert most == second, (group, answers)


def test_gqa_entries_have_the_official_keys():
    chosen = gqa_questions(THINGS, scenes("gqa", 40), 100, 0)
    entries = gqa_entries(chosen, [str(question.image_index) for question in chosen], 700)
    assert list(entries)[:2] == ["00000700", "00000701"]
    for entry in entries.values():
        assert set(entry) == {"imageId", "question", "answer", "fullAnswer", "isBalanced", "groups", "types"}
        assert set(entry["types"]) == {"structural", "semantic", "detailed"}
        assert entry["types"]["structural"] in {"verify", "query", "choose", "logical", "compare"}
        assert entry["types"]["semantic"] in {"obj", "attr", "cat", "rel"}


def statement_truth(pair: tuple[Scene, Scene], text: str) -> bool:
    numbers = {"left": 0, "right": 1}
    if match := re.fullmatch(r"There are exactly (\w+) (\w+) in the two images\.", text):
        return sum(count(scene, match[2]) for scene in pair) == NUMBERS[match[1]]
    if match := re.fullmatch(r"Both images contain an? (\w+)\.", text):
        return all(count(scene, match[1]) for scene in pair)
    if match := re.fullmatch(r"Exactly one of the images contains an? (\w+)\.", text):
        return [count(scene, match[1]) > 0 for scene in pair].count(True) == 1
    if match := re.fullmatch(r"There are more (\w+) in the (\w+) image than in the (\w+) image\.", text):
        return count(pair[numbers[match[2]]], match[1]) > count(pair[numbers[match[3]]], match[1])
    if text == "Both images contain the same number of objects.":
        return len(pair[0].objects) == len(pair[1].objects)
    if match := re.fullmatch(r"The (\w+) image contains an? (\w+) (\w+)\.", text):
        return any(p.name == match[3] and p.color == match[2] for p in pair[numbers[match[1]]].objects)
    if match := re.fullmatch(r"There is at least one (\w+) in the (\w+) image\.", text):
        return count(pair[numbers[match[2]]], match[1]) > 0
    if match := re.fullmatch(r"The image on the (\w+) shows exactly (\w+) objects\.", text):
        return len(pair[numbers[match[1]]].objects) == NUMBERS[match[2]]
    if match := re.fullmatch(r"The (\w+) image shows an? (\w+)\.", text):
        return count(pair[numbers[match[1]]], match[2]) > 0
    if match := re.fullmatch(r"One image contains an? (\w+) and the other image contains an? (\w+)\.", text):
        has = [[count(scene, match[number]) > 0 for number in (1, 2)] for scene in pair]
        return (has[0][0] and has[1][1]) or (has[0][1] and has[1][0])
    match = re.fullmatch(rf"In one of the images an? (\w+) is {SIDES} an? (\w+)\.", text)
    assert match, text
    return any(
        beyond(one, other, match[2]) > 0
        for scene in pair
        for one in scene.objects
        for other in scene.objects
        if (one.name, other.name) == (match[1], match[3])
    )


def test_statements_are_true_of_half_the_pairs():
    sets = list(pair_sets(THINGS, 0, "dev", 60))
    assert sets == list(pair_sets(THINGS, 0, "dev", 60))
    for made in sets:
        assert len(made.pairs) == 4
        assert len({text for text, _ in made.sentences}) == 4
        for text, labels in made.sentences:
            assert sorted(labels) == [False, False, True, True]
            assert [statement_truth(pair, text) for pair in made.pairs] == list(labels), text
    assert len({" ".join(text.split()[:3]) for made in sets for text, _ in made.sentences}) >= 10


@given(st.integers(0, 10**6))
def test_captions_name_what_is_there(index):
    scene = make_scene(THINGS, 0, "captions", index)
    first, second, third, fourth, fifth = made = captions(scene, 0)
    assert len(set(made)) == 5
    assert made == captions(scene, 0)
    for caption in made:
        assert caption[0].isupper()
        assert caption.endswith(".")
        named = {WORDS[word] for word in re.findall(r"\w+", caption) if word in WORDS}
        assert named <= {placed.name for placed in scene.objects}
        assert named
    for caption in (first, second):
        listed = Counter()
        for number, words in re.findall(r"\b(an?|two|three|four|five|six) ((?:\w+ )?\w+)", caption.lower()):
            if (name := words.split()[-1] if words.split()[-1] in WORDS else words.split()[0]) in WORDS:
                listed[WORDS[name]] += NUMBERS[number]
        assert listed == Counter(placed.name for placed in scene.objects), caption
    if fourth.startswith("From left to right"):
        order = [word for word in re.findall(r"\w+", fourth) if word in SHAPES]
        assert order == [placed.name for placed in sorted(scene.objects, key=lambda placed: placed.x)]
    if match := re.search(rf"(\w+) {SIDES} an? (?:\w+ )?(\w+)", third):
        assert any(beyond(one, other, match[2]) > 0 for one in scene.named(match[1]) for other in scene.named(match[3]))
    assert ("large" in fifth) != ("small" in fifth)

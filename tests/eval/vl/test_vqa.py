"""VQA accuracy against the official script, transcribed in official_vqa.py."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers.vqa_answers import normalize_answer, soft_scores
from dora_mm.eval.vl.metrics import report, score, score_row
from dora_mm.eval.vl.vqa import label_accuracy, score_vqa, vqa_accuracy
from tests.eval.vl import official_vqa

OFFICIAL = {"official": official_vqa.official, "lavis": official_vqa.lavis}
FEW, MANY = 2_000, 10_000  # questions

PLAIN = "a an the A The none zero one two Three ten eleven yes no Yes red dog left 1 10 3.5 1,000 2,5 5. .5 p.m."
CONTRACTED = [*official_vqa.CONTRACTIONS, *official_vqa.CONTRACTIONS.values()]
MARKS = "\n\t\r.,;:!?-_/\\'\"`@()[]{}<>=+"
SPACED = ["  ", ". ", " .", ", ", " ,", "-\n", "\n-", "\t?", "?\t", "..", "", "\u00a0", "é", "٣", "$", "\u2028"]
JOINTS = [*" " * 16, *MARKS, *SPACED]


def unusual_text(rng: random.Random) -> str:
    parts = [rng.choice(("",) * 60 + tuple(JOINTS))]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        parts += [rng.choice(CONTRACTED if rng.random() < 0.25 else PLAIN.split()), rng.choice(JOINTS)]
    text = "".join(parts if rng.random() < 0.3 else parts[:-1])
    return rng.choice((str, str, str, str, str.upper, str.capitalize))(text) * rng.choice((1,) * 60 + (40,))


def variant(rng: random.Random, text: str) -> str:
    """A text that may be the same after normalisation."""
    change = rng.randrange(8)
    if change == 0:
        return f"the {text}"
    if change == 1:
        return text.capitalize()
    if change == 2:
        return f" {text}\n"
    if change == 3:
        return f"{text}."
    if change == 4:
        return text.replace("'", "", 1)
    if change == 5:
        return text.replace(" ", rng.choice(JOINTS))
    return text


def unusual_question(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction and ten answers, few of them distinct, so that all match counts occur; in a tenth all agree."""
    distinct = [unusual_text(rng) for _ in range(rng.randint(1, 3))]
    answers = [rng.choice(distinct) for _ in range(10)]
    if rng.random() < 0.1:
        answers = [distinct[0]] * 10
    elif rng.random() < 0.7:
        answers = [variant(rng, answer) for answer in answers]
    prediction = rng.choice([*answers, *distinct, unusual_text(rng)])
    return variant(rng, prediction) if rng.random() < 0.5 else prediction, answers


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def unusual_questions(request) -> list[tuple[str, list[str]]]:
    rng = random.Random(0)
    return [unusual_question(rng) for _ in range(request.param)]


@pytest.mark.parametrize(("mode", "every"), [("official", 1), ("lavis", 2)])
def test_equals_the_official_script_on_random_answers(unusual_questions, mode, every):
    found, differing = [], []
    for prediction, answers in unusual_questions[::every]:
        ours = vqa_accuracy(prediction, answers, mode)
        theirs = OFFICIAL[mode](prediction, official_vqa.annotations_of(answers))
        found.append(ours)
        if abs(ours - theirs) > 1e-12:
            differing.append((prediction, answers, ours, theirs))
    assert differing == []
    assert all(found.count(value) > len(found) / 100 for value in (0.0, 0.3, 0.6, 0.9, 1.0))  # often enough


def test_normal_forms_equal_the_official_ones(unusual_questions):
    texts = {text for prediction, answers in unusual_questions for text in (prediction, *answers)}
    assert len(texts) > len(unusual_questions)
    for text in texts:
        plain = official_vqa.without_line_breaks(text)
        assert normalize_answer(text) == official_vqa.digits_and_articles(official_vqa.punctuation(plain))


def test_the_modes_differ_on_the_random_answers(unusual_questions):
    differing = sum(vqa_accuracy(s, a) != vqa_accuracy(s, a, "lavis") for s, a in unusual_questions)
    assert differing > len(unusual_questions) / 20


TEXTS = st.one_of(
    st.text(max_size=20), st.text("aA1,.; '-\n\ttheno", max_size=12), st.sampled_from(["yes", "Yes", "none", "0", "a"])
)


@settings(max_examples=300)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_equals_the_official_script_on_any_text(prediction, distinct, choices):
    answers = [distinct[choice % len(distinct)] for choice in choices]
    for mode, reference in OFFICIAL.items():
        for text in (prediction, answers[0]):
            theirs = reference(text, official_vqa.annotations_of(answers))
            assert vqa_accuracy(text, answers, mode) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lavis"),
    [
        ("yes", ["yes"] * 10, 1.0, 1.0),
        ("Yes", ["yes"] * 10, 0.0, 1.0),  # where all agree nothing is normalised
        ("Yes", ["yes"] * 9 + ["no"], 1.0, 1.0),
        ("none", ["none"] * 10, 1.0, 0.0),
        ("none", ["none"] * 9 + ["0"], 1.0, 0.3),
        ("dont know", ["dont know"] * 5 + ["no"] * 5, 1.0, 0.0),
        ("two", ["2", "2", "2", *["3"] * 7], 0.9, 0.9),
        ("two", ["2", "2", *["3"] * 8], 0.6, 0.6),
        ("two", ["2", *["3"] * 9], 0.3, 0.3),
        ("red\ndog", ["red dog"] * 10, 1.0, 1.0),
        ("left-hand-\nside", ["lefthand side", *["no"] * 9], 0.3, 0.3),
        ("yes\n", ["yes"] * 9 + ["yes\t"], 1.0, 1.0),
    ],
)
def test_known_cases(prediction, answers, official, lavis):
    assert vqa_accuracy(prediction, answers) == official
    assert vqa_accuracy(prediction, answers, "lavis") == lavis


def test_other_numbers_than_ten_answers_are_rejected():
    with pytest.raises(ValueError, match="ten answers, got 9"):
        vqa_accuracy("yes", ["yes"] * 9)
    with pytest.raises(ValueError, match="question 7: .* got 11"):
        score_row("vqa", Example("7", ("a.jpg",), "?", raw_answers=("yes",) * 11), "yes")


def test_labels_agree_with_the_ten_answers_unless_all_agree(unusual_questions):
    for prediction, answers in unusual_questions[:2000]:
        normal = [normalize_answer(answer) for answer in answers]
        stable = all(normal) and normal == [normalize_answer(answer) for answer in normal]  # not with 33 periods
        if stable and len({official_vqa.without_line_breaks(answer) for answer in answers}) > 1:
            scores = soft_scores(answers)
            assert label_accuracy(prediction, list(scores), list(scores.values())) == vqa_accuracy(prediction, answers)


def example(key: str, answers: list[str], *kinds: str) -> Example:
    scores = soft_scores(answers)
    return Example(key, ("x.jpg",), "?", tuple(scores), tuple(scores.values()), tuple(answers), kinds)


def test_score_vqa_with_tables():
    rows = [
        (example("1", ["yes"] * 10, "yes/no", "is the"), "yes"),
        (example("2", ["yes"] * 10, "yes/no", "is this"), "no"),
        (example("3", ["2", "2", *["3"] * 8], "number", "how many"), "two"),
    ]
    scores = score("vqa", rows)
    assert (scores.main, scores.value) == ("accuracy", pytest.approx(160 / 3))
    assert scores.tables["answer_type"] == {"number": (pytest.approx(60), 1), "yes/no": (pytest.approx(50), 2)}
    assert list(scores.tables["question_type"]) == ["how many", "is the", "is this"]
    text = report("vqa", scores)
    assert "| accuracy | 53.33 |" in text
    assert "| yes/no | 50.00 | 2 |" in text


def test_both_scores_are_reported_and_the_published_one_is_named():
    rows = [
        (example("1", ["yes"] * 10, "yes/no"), "Yes"),  # right for the older script alone
        (example("2", ["none"] * 9 + ["0"], "other"), "none"),
        (example("3", ["red"] * 10, "other"), "red"),
    ]
    scores = score("vqa", rows)
    assert scores.metrics == {
        "accuracy": pytest.approx(100 * (0 + 1 + 1) / 3),
        "accuracy (lavis)": pytest.approx(100 * (1 + 0.3 + 1) / 3),
    }
    assert scores.value == scores.metrics["accuracy"]
    text = report("vqa", scores)
    assert "| accuracy (lavis) | 76.67 | the older script in LAVIS: the published scores of VL-BART and BLIP |" in text


def test_rows_without_the_ten_answers_are_scored_by_labels_with_a_note():
    rows = [
        (Example("1", ("x.jpg",), "?", ("yes", "no"), (1.0, 0.3)), "No."),
        (example("2", ["yes"] * 9 + ["no"]), "yes"),
    ]
    scores = score_vqa(rows)
    assert scores.metrics == {"accuracy": pytest.approx(65), "accuracy (lavis)": pytest.approx(65)}
    assert scores.tables == {}
    assert "1 of 2 questions scored by their labels" in scores.notes[0]


def test_a_question_with_an_empty_label_counts_as_wrong():
    labelled = Example("1", ("x.jpg",), "?", ("yes",), (1.0,))
    scores = score_vqa([(labelled, "yes"), (Example("2", ("x.jpg",), "?"), "no")])
    assert scores.metrics == {"accuracy": 50.0}
    assert "lavis" not in " ".join([*scores.metrics, *scores.notes])  # there are no ten answers to either
    assert scores.notes[1] == "1 of 2 questions have an empty label, and count as wrong"


def test_a_test_split_is_not_scored():
    with pytest.raises(ValueError, match="42 has no answers"):
        score_vqa([(Example("42", ("x.jpg",), "?"), "yes")])
    with pytest.raises(ValueError, match="no rows"):
        score_vqa([])
    assert score_row("vqa", Example("42", ("x.jpg",), "?"), "yes") is None

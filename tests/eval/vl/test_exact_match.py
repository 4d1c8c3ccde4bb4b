"""GQA, NLVR2, the video questions, conversations and multiple choice."""

import pytest

from dora_mm.data.vl.example import Example, Turn
from dora_mm.eval.vl.choice import chosen_letter
from dora_mm.eval.vl.metrics import report, score, score_row
from dora_mm.eval.vl.nlvr2 import sentence_of
from dora_mm.eval.vl.question_only import mean_accuracy, question_only_answers
from dora_mm.eval.vl.scores import VLScores


def row(key: str, right: str, prediction: str, *kinds: str) -> tuple[Example, str]:
    return Example(key, ("a.jpg",), "?", (right,), (1.0,), (), kinds), prediction


def test_gqa_is_exact_match_with_open_and_binary():
    rows = [
        row("1", "yes", "yes", "verify", "attr"),
        row("2", "no", "No", "logical", "attr"),  # the official script does not ignore case
        row("3", "left", "left", "choose", "rel"),
        row("4", "dog", "dog ", "query", "obj"),
    ]
    scores = score("gqa", rows)
    assert scores.metrics == {
        "accuracy": 75.0,
        "accuracy (folded)": 100.0,
        "open": 100.0,
        "binary": pytest.approx(200 / 3),
    }
    assert "| accuracy (folded) | 100.00 | without case" in report("gqa", scores)
    assert scores.tables["semantic"] == {"attr": (50.0, 2), "obj": (100.0, 1), "rel": (100.0, 1)}
    assert scores.tables["structural"]["logical"] == (0.0, 1)


def test_gqa_without_types_has_only_its_accuracy():
    scores = score("gqa", [row("1", "yes", "yes"), row("2", "no", "yes")])
    assert (scores.metrics, scores.tables) == ({"accuracy": 50.0, "accuracy (folded)": 50.0}, {})


def test_nlvr2_consistency_is_over_sentences():
    rows = [
        row("dev-850-0-0", "true", "true"),
        row("dev-850-1-0", "false", "false"),  # the same sentence with another pair
        row("dev-850-0-1", "true", "True"),
        row("dev-850-1-1", "false", "true"),
        row("dev-85-0-0", "true", "yes"),
    ]
    scores = score("nlvr2", rows)
    assert scores.metrics == {"accuracy": 60.0, "consistency": pytest.approx(100 / 3)}
    assert scores.tables == {"answer": {"false": (50.0, 2), "true": (pytest.approx(200 / 3), 3)}}


def test_sentence_of_leaves_the_pair_out():
    assert sentence_of("test1-12-3-0") == sentence_of("test1-12-0-0") != sentence_of("test1-12-3-1")
    with pytest.raises(ValueError, match="'17' is not of the form split-set-pair-sentence"):
        sentence_of("17")


@pytest.mark.parametrize("task", ["tvqa", "how2qa"])
def test_video_questions(task):
    rows = [row("1", "a0", "a0"), row("2", "a3", "a0"), row("3", "a1", "a12"), row("4", "a1", "the second")]
    scores = score(task, rows)
    assert scores.metrics == {"accuracy": 25.0}
    assert scores.tables["answer"] == {"a0": (100.0, 1), "a1": (0.0, 2), "a3": (0.0, 1)}
    assert scores.notes == ("2 of 4 predictions name no choice and count as wrong",)
    assert score(task, rows[:2]).notes == ()


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2", "tvqa", "how2qa", "chat"])
def test_the_main_metric_is_the_mean_over_rows(task):
    rows = [row("d-1-0-0", "true", "true"), row("d-1-1-0", "false", "true"), row("d-2-0-0", "true", "true")]
    scores = score(task, rows)
    assert scores.main == "accuracy"
    assert scores.value == pytest.approx(100 * sum(score_row(task, *pair) or 0.0 for pair in rows) / 3)


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "tvqa", "caption", "tvc", "chat", "choice"])
def test_rows_without_answers_are_not_scored(task):
    with pytest.raises(ValueError, match="dev-1-0-0 has no answers"):
        score(task, [(Example("dev-1-0-0", ("a.jpg",), "?"), "yes")])
    assert score_row(task, Example("dev-1-0-0", ("a.jpg",), "?"), "yes") is None


def test_report_is_markdown():
    scores = VLScores("accuracy", {"accuracy": 12.345}, {"semantic": {"obj": (12.345, 1234)}}, ("a note",))
    assert report("gqa", scores) == (
        "| gqa | x 100 |\n| --- | --- |\n| accuracy | 12.35 |\n\n"
        "| semantic | accuracy | rows |\n| --- | --- | --- |\n| obj | 12.35 | 1,234 |\n\n- a note"
    )
    empty = VLScores("CIDEr", {}, {}, ("skipped: no Java",))
    assert empty.value is None
    assert report("caption", empty) == "| caption | x 100 |\n| --- | --- |\n\n- skipped: no Java"


def chat(answer: str, prediction: str) -> tuple[Example, str]:
    turns = (Turn("user", "<image>?", False), Turn("assistant", answer, True))
    return Example(answer, ("a.jpg",), "?", (answer,), (1.0,), turns=turns), prediction


def test_chat_is_exact_match_of_the_last_answer():
    rows = [
        chat("A red car.", "A red car.\n"),
        chat("A red car.", " a  RED\ncar"),
        chat("Yes", "yes!"),
        chat("-5", "5"),
        chat("?", "!"),
        chat("no", "yes"),
    ]
    scores = score("chat", rows)
    assert (scores.main, scores.metrics["accuracy"]) == ("accuracy", 50.0)
    assert scores.metrics["exact"] == pytest.approx(100 / 6)
    assert [score_row("chat", *row) for row in rows] == [1, 1, 1, 0, 0, 0]
    asked = rows[2][0]
    (guess,) = question_only_answers([chat("Yes.", "")[0]], [asked])
    assert mean_accuracy([(asked, guess)]) == 100.0


def choice(right: str, prediction: str, *kinds: str) -> tuple[Example, str]:
    options = ("a red car", "a dog", "A")
    return Example(prediction + right, ("a.jpg",), "?", (right,), (1.0,), (), kinds, options=options), prediction


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        (" (B)\n", "B"),
        ("B.", "B"),
        ("B: a dog", "B"),
        ("A dog", "B"),
        ("a dog.", "B"),
        ("A red car", "A"),
        ("A", "A"),
        ("D", None),
        ("Both", None),
        ("b", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(prediction, letter):
    assert chosen_letter(choice("B", prediction)[0], prediction) == letter


def test_choices_are_scored_by_category():
    rows = [
        choice("B", "B", "animals"),
        choice("B", "a dog", "cars"),
        choice("A", "C.", "cars"),
        choice("C", "hm", "x"),
    ]
    scores = score("choice", rows)
    assert scores.metrics == {"accuracy": 50.0}
    assert scores.tables["category"] == {"animals": (100.0, 1), "cars": (50.0, 2), "x": (0.0, 1)}
    assert scores.tables["answer"] == {"A": (0.0, 1), "B": (100.0, 2), "C": (0.0, 1)}
    assert scores.notes == ("1 of 4 predictions name no option and count as wrong",)
    assert [score_row("choice", *row) for row in rows] == [1, 1, 0, 0]

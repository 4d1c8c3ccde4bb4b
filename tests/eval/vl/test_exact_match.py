"""GQA, NLVR2 and the video questions."""

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.metrics import VLScores, main_metric, report, score, score_row
from dora_mm.eval.vl.nlvr2 import sentence_of


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
    assert scores.metrics == {"accuracy": 75.0, "open": 100.0, "binary": pytest.approx(200 / 3)}
    assert scores.tables["semantic"] == {"attr": (50.0, 2), "obj": (100.0, 1), "rel": (100.0, 1)}
    assert scores.tables["structural"]["logical"] == (0.0, 1)


def test_gqa_without_types_has_only_its_accuracy():
    scores = score("gqa", [row("1", "yes", "yes"), row("2", "no", "yes")])
    assert (scores.metrics, scores.tables) == ({"accuracy": 50.0}, {})


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
    assert (scores.task, scores.metrics) == (task, {"accuracy": 25.0})
    assert scores.tables["answer"] == {"a0": (100.0, 1), "a1": (0.0, 2), "a3": (0.0, 1)}
    assert scores.notes == ("2 of 4 predictions name no choice and count as wrong",)
    assert score(task, rows[:2]).notes == ()


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2", "tvqa", "how2qa"])
def test_the_main_metric_is_the_mean_over_rows(task):
    rows = [row("d-1-0-0", "true", "true"), row("d-1-1-0", "false", "true"), row("d-2-0-0", "true", "true")]
    scores = score(task, rows)
    assert scores.main == main_metric(task)
    assert scores.value == pytest.approx(100 * sum(score_row(task, *pair) or 0.0 for pair in rows) / 3)


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "tvqa", "caption", "tvc"])
def test_rows_without_answers_are_not_scored(task):
    with pytest.raises(ValueError, match="dev-1-0-0 has no answers"):
        score(task, [(Example("dev-1-0-0", ("a.jpg",), "?"), "yes")])
    assert score_row(task, Example("dev-1-0-0", ("a.jpg",), "?"), "yes") is None


def test_report_is_markdown():
    scores = VLScores("gqa", "accuracy", {"accuracy": 12.345}, {"semantic": {"obj": (12.345, 1234)}}, ("a note",))
    assert report(scores) == (
        "| gqa | x 100 |\n| --- | --- |\n| accuracy | 12.35 |\n\n"
        "| semantic | accuracy | rows |\n| --- | --- | --- |\n| obj | 12.35 | 1,234 |\n\n- a note"
    )
    empty = VLScores("caption", "CIDEr", {}, {}, ("skipped: no Java",))
    assert empty.value is None
    assert report(empty) == "| caption | x 100 |\n| --- | --- |\n\n- skipped: no Java"

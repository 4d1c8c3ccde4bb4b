"""The scores of answers that name an option in words, against cases worked by hand."""

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.metrics import score, score_row, task_table
from dora_mm.eval.vl.scores import VLScores


def row(number, right, options):
    return Example(str(number), (), "?", (f"the correct answer is {right}",), (1.0,), options=options)


BOOL, FOUR = ("true", "false"), ("answer1", "answer2", "answer3", "answer4")
PREDICTIONS = [
    (row(1, "true", BOOL), "the correct answer is true"),
    (row(2, "true", BOOL), "false, no: true"),
    (row(3, "false", BOOL), "I do not know"),
    (row(4, "false", BOOL), "False"),  # the pattern has small letters alone
    (row(5, "answer3", FOUR), "answer3answer1"),
    (row(6, "answer3", FOUR), "answer5 or answer3"),
    (row(7, "answer2", FOUR), "hm\n### Response:\nanswer2"),  # of another answer
    (row(8, "answer2", FOUR), "answer2\n### Response:\nanswer1"),
]


def test_the_accuracy_is_that_of_the_official_pattern():
    rights = [score_row("arc_easy", *prediction) for prediction in PREDICTIONS]
    assert rights == [1, 0, 0, 0, 1, 0, 0, 1]
    found = score("arc_easy", PREDICTIONS)
    assert found.metrics == {"accuracy": pytest.approx(37.5)}
    assert found.tables == {
        "answer": {"answer2": (50.0, 2), "answer3": (50.0, 2), "false": (0.0, 2), "true": (50.0, 2)}
    }
    assert found.notes == ("3 of 8 predictions name no option and count as wrong",)


def test_the_table_of_tasks_has_their_mean():
    scores = {"boolq": VLScores("accuracy", {"accuracy": 70.0}), "piqa": VLScores("accuracy", {"accuracy": 81.04})}
    assert task_table(scores).splitlines()[::2] == ["| BoolQ | PIQA | mean |", "| 70.0 | 81.0 | 75.5 |"]


def test_no_mean_of_different_metrics_and_no_table_of_nothing():
    scores = {"boolq": VLScores("accuracy", {"accuracy": 70.0}), "caption": VLScores("CIDEr", {"CIDEr": 210.0})}
    assert "mean" not in task_table(scores)
    assert "| 70.0 | 210.0 |" in task_table(scores)
    assert task_table({"boolq": VLScores("accuracy", {}), "caption": VLScores("CIDEr", {})}) == ""

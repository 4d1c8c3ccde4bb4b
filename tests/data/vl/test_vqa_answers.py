"""Normal forms of answers, and the labels that follow; equality with the official script is tested in tests/eval/vl."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.vl.vqa_answers import normalize_answer, soft_scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red Bus", "red bus"),
        ("a\nman\tand an apple", "man and apple"),
        ("two", "2"),
        ("twelve", "twelve"),
        ("none", "0"),  # by the official table
        ("dont know", "don't know"),
        ("im ok", "im ok"),  # the table has "Im", which lowered words never are
        ("somebody'd", "somebodyd"),
        ("wouldn'tve", "wouldn't've"),
        ("y'alldve", "y'alldve"),  # two apostrophes are missing
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black/white ,no", "black white no"),  # each mark is judged alone
        ("1,000-2,000", "10002000"),  # a comma in a number glues at every mark
        ("a.m.", "am"),
        ("3.5", "3.5"),
        ("St.5", "st.5"),  # spared for the digit behind it
        ("5.", "5"),  # the digit before it does not spare it
        ("isn't it", "isn't it"),
        ("." * 40, "." * 8),  # no more than 32 periods go
        ("A", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_soft_scores_count_people_by_normal_form():
    raw = ["Two", "2", "two.", "2 ", "three", "three", "3", "a dog", "dog", "none"]
    assert soft_scores(raw) == {"2": 1.0, "3": 0.9, "dog": 0.6, "0": 0.3}
    assert list(soft_scores(["no", *["yes"] * 9])) == ["yes", "no"]


def test_an_answer_of_which_nothing_is_left_stays_itself():
    assert soft_scores(["A", "a", "a ", *["B"] * 7]) == {"b": 1.0, "a": 0.9}


@given(st.lists(st.text(max_size=12), min_size=10, max_size=10))
def test_soft_scores_are_labels(raw):
    scores = soft_scores(raw)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert set(scores.values()) <= {0.3, 0.6, 0.9, 1.0}
    assert sum(scores.values()) >= 1.0

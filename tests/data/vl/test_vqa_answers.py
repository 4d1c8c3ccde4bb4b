"""Normalised answers and their scores; agreement with the official script is tested in tests/eval/vl."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.vl.readers.vqa_answers import normalize_answer, soft_scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red Bus", "red bus"),
        ("a\nman\tand an apple", "man and apple"),
        ("two", "2"),
        ("twelve", "twelve"),
        ("none", "0"),  # by the official table
        ("dont know", "don't know"),
        ("im ok", "im ok"),  # the table has "Im", which lower-cased words never match
        ("somebody'd", "somebodyd"),
        ("wouldn'tve", "wouldn't've"),
        ("y'alldve", "y'alldve"),  # two apostrophes are missing
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black/white ,no", "black white no"),  # each mark is treated separately
        ("1,000-2,000", "10002000"),  # with a comma in a number every mark is removed
        ("a.m.", "am"),
        ("3.5", "3.5"),
        ("St.5", "st.5"),  # kept because of the digit after it
        ("5.", "5"),  # the digit before it does not matter
        ("isn't it", "isn't it"),
        ("." * 40, "." * 8),  # at most 32 periods are removed
        ("A", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_soft_scores_count_people_by_normalised_answer():
    raw = ["Two", "2", "two.", "2 ", "three", "three", "3", "a dog", "dog", "none"]
    assert soft_scores(raw) == {"2": 1.0, "3": 0.9, "dog": 0.6, "0": 0.3}
    assert list(soft_scores(["no", *["yes"] * 9])) == ["yes", "no"]


def test_an_answer_that_normalisation_would_empty_is_kept():
    assert soft_scores(["A", "a", "a ", *["B"] * 7]) == {"b": 1.0, "a": 0.9}


@given(st.lists(st.text(max_size=12), min_size=10, max_size=10))
def test_soft_scores_are_valid_and_sorted(raw):
    scores = soft_scores(raw)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert set(scores.values()) <= {0.3, 0.6, 0.9, 1.0}
    assert sum(scores.values()) >= 1.0

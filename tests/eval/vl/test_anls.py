"""ANLS: distances within a band equal those of the whole table, and long texts take seconds."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.eval.vl import anls


def whole_table(first: str, second: str) -> int:
    """The Levenshtein distance by its definition."""
    above = list(range(len(second) + 1))
    for row, a in enumerate(first, 1):
        line = [row]
        for column, b in enumerate(second, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (a != b)))
        above = line
    return above[-1]


TEXTS = st.text("ab", max_size=20) | st.text("abcdé東\n ", max_size=20)


@given(TEXTS, TEXTS, st.integers(0, 24))
def test_distances_are_those_of_the_whole_table_up_to_the_most(first, second, most):
    distance = whole_table(first, second)
    assert anls.edits(first, second, most) == (distance if distance <= most else None)


@given(TEXTS, TEXTS, st.integers(1, 24))
def test_similarities_are_those_of_the_whole_table(first, second, more):
    length = max(len(first), len(second)) + more
    found = 1 - whole_table(first, second) / length
    assert anls.similarity(first, second, length) == (found if found >= 0.5 else 0.0)


def test_distances_of_texts_with_more_letters_than_are_kept():
    draw = random.Random(0)
    letters = [chr(0x4E00 + number) for number in range(600)]
    first = "".join(draw.choices(letters, k=900))
    second = "".join(character if draw.random() < 0.7 else draw.choice(letters) for character in first)
    assert anls.edits(first, second, 450) == whole_table(first, second)


@pytest.mark.parametrize(("size", "seconds"), [(20_000, 3), pytest.param(200_000, 60, marks=pytest.mark.slow)])
def test_long_texts_of_two_letters_take_seconds(size, seconds):
    """The whole table of the longer ones has 40 billion cells."""
    draw = random.Random(0)
    first, second = ("".join(draw.choices("ab", k=size)) for _ in range(2))
    start = time.perf_counter()
    assert 0.5 < anls.official(first, second) < 0.8
    assert anls.stripped(first, second) == anls.lowered(first, second)
    assert time.perf_counter() - start < seconds

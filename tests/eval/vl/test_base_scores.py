"""The scores of a base model beside those of an adapter: the paired difference, where there are enough answers."""

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.statistics import LEAST_GROUPS
from dora_mm.eval.vl.base_scores import read_base, with_gain, write_base
from dora_mm.eval.vl.metrics import score


def answered(num: int, right: int) -> list[tuple[Example, str]]:
    rows = [Example(str(number), (f"{number}.png",), "What is it?", ("a bus",), (1.0,)) for number in range(num)]
    return [(row, "a bus" if number < right else "a tram") for number, row in enumerate(rows)]


def notes(folder, num: int, before: int, after: int) -> list[str]:
    write_base(folder / "base.json", {"short_answers": answered(num, before)})
    rows, base = answered(num, after), read_base(folder / "base.json")
    return list(with_gain("short_answers", score("short_answers", rows), rows, base.get("short_answers")).notes)


def test_the_gain_has_an_interval_of_paired_differences(tmp_path):
    precision, gain = notes(tmp_path, 40, 10, 30)
    assert precision.startswith("exact match 75.0 (")
    assert gain.startswith("exact match of the base 25.0, with the adapter 75.0: 50.0 (33.")
    assert gain.endswith("points; 95 % interval; n = 40")


@pytest.mark.parametrize("num", [1, 8, LEAST_GROUPS - 1])
def test_few_answers_have_no_interval(tmp_path, num):
    precision, gain = notes(tmp_path, num, 0, num)
    assert precision == f"exact match 100.0: no 95 % interval, which takes 20 independent answers; n = {num}"
    assert gain.startswith("exact match of the base 0.0, with the adapter 100.0: 100.0 points; no 95 % interval")


def test_other_rows_than_those_of_the_base_are_not_compared(tmp_path):
    write_base(tmp_path / "base.json", {"short_answers": answered(30, 3)})
    base, rows = read_base(tmp_path / "base.json")["short_answers"], answered(29, 3)
    assert len(with_gain("short_answers", score("short_answers", rows), rows, base).notes) == 1
    assert read_base(tmp_path / "none.json") == {}

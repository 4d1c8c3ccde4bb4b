"""The combined score of several tasks."""

import pytest

from dora_mm.train.validation import overall


def test_the_overall_score_does_not_depend_on_the_scales_of_the_metrics():
    """Figures from the scenes: one rate is 8 % worse than the other in captions and 15 % better in questions."""
    better, worse = {"vqa": 59.4, "caption": 208.6}, {"vqa": 51.6, "caption": 226.7}
    assert sum(better.values()) < sum(worse.values())
    assert overall(better) > overall(worse)
    assert overall({"vqa": 50.0, "caption": 200.0}) == pytest.approx(100.0)
    assert overall({"vqa": 60.4}) == pytest.approx(60.4)
    assert overall({"vqa": 0.0, "caption": 200.0}) == 0.0

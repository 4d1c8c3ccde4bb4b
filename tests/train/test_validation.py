"""The combined score of several tasks."""

import pytest

from dora_mm.eval.vl.scores import VLScores
from dora_mm.train.metrics import read_metrics
from dora_mm.train.validation import Validation, overall
from tests.train.small import new_run


def test_all_metrics_are_logged_and_the_main_ones_decide(tmp_path):
    run, saved = new_run(tmp_path / "run"), []
    rounds = iter([{"accuracy": 50.0, "accuracy (lavis)": 60.0}, {"accuracy": 49.0, "accuracy (lavis)": 70.0}])
    validate = Validation(run, lambda: {"vqa": VLScores("accuracy", next(rounds))}, saved.append, 0)
    for step in (1, 2):
        validate(step)
    validate.close()
    assert saved == [run.path / "best" / "vqa", run.path / "best" / "overall"]
    first, _ = read_metrics(run.path / "validation" / "metrics.jsonl")
    assert first == {"step": 1, "vqa": 50.0, "overall": 50.0, "vqa/accuracy (lavis)": 60.0}


def test_the_overall_score_does_not_depend_on_the_scales_of_the_metrics():
    """Figures from the scenes: one rate is 8 % worse than the other in captions and 15 % better in questions."""
    better, worse = {"vqa": 59.4, "caption": 208.6}, {"vqa": 51.6, "caption": 226.7}
    assert sum(better.values()) < sum(worse.values())
    assert overall(better) > overall(worse)
    assert overall({"vqa": 50.0, "caption": 200.0}) == pytest.approx(100.0)
    assert overall({"vqa": 60.4}) == pytest.approx(60.4)
    assert overall({"vqa": 0.0, "caption": 200.0}) == 0.0

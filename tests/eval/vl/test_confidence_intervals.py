"""Scores of answers, and intervals over questions that share an image."""

import shutil

import numpy as np
import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.confidence_intervals import (
    AnswerScores,
    answer_scores,
    confidence_intervals,
    gain_over_question_only,
    group_cells,
    group_of,
    points,
)
from dora_mm.eval.vl.metrics import score, scorer_of
from tests.shared.answers import random_scores


def example(number: int, *answers: str, image: str = "a.jpg", raw: tuple[str, ...] = (), **changes) -> Example:
    fields = {"images": (image,), "text": "What?", "answers": answers, "scores": (1.0,) * len(answers)}
    return Example(**{"id": str(number), **fields, "raw_answers": raw, **changes})


TEN = ("a dog",) * 2 + ("cat",) * 8
ROWS = {
    "vqa": [
        (example(0, "dog", "cat", raw=TEN), "dog"),
        (example(1, "cat", raw=TEN), "a cat"),
        (example(2, raw=("x",) * 10), "y"),
    ],
    "gqa": [(example(0, "left"), "left"), (example(1, "left"), "right"), (example(2, "no"), "no")],
    "nlvr2": [
        (example(n, "true", id=f"dev-1-{n}-0"), prediction) for n, prediction in enumerate(("true", "false", "true"))
    ],
    "caption": [
        (example(0, "a dog runs over a field", "the dog is in a field"), "a dog runs in a field"),
        (example(1, "two red cats on a mat"), "a red cat on a mat"),
        (example(2, "nothing at all"), "something else"),
    ],
}
ROWS["tvc"] = ROWS["caption"]


@pytest.mark.parametrize("task", [t if t != "tvc" else pytest.param(t, marks=pytest.mark.slow) for t in ROWS])
def test_the_mean_of_answer_scores_is_the_main_metric(task):
    if task in ("caption", "tvc") and shutil.which("java") is None:
        pytest.skip("caption metrics need Java")
    values = scorer_of(task).values(ROWS[task])
    assert values.shape == (3,)
    assert values.std() > 0
    assert 100 * values.mean() == pytest.approx(score(task, ROWS[task], meteor=False).value)
    scores = answer_scores(task, [ROWS[task], ROWS[task]])
    assert scores is not None
    assert scores.values_QS.shape == (3, 2)


def test_captions_that_cannot_be_scored_have_no_answer_scores(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert answer_scores("caption", [ROWS["caption"]]) is None


def test_group_of():
    assert group_of("vqa", example(1, image="b.jpg")) == "b.jpg"
    assert group_of("chat", example(1, images=())) != group_of("chat", example(2, images=()))
    pair = {"images": ("dev-850-2-img0.png", "dev-850-2-img1.png")}
    assert group_of("nlvr2", example(0, id="dev-850-2-1", **pair)) == "dev-850"
    assert group_of("nlvr2", example(0, id="17", **pair)) == "dev-850-2-img0.png dev-850-2-img1.png"


def test_cells_have_the_mean_of_all_answers_in_every_run():
    scores, other = random_scores(30), random_scores(20, seed=1, prefix="other ")
    cells_GS = group_cells([scores])
    assert cells_GS.shape == (30, 3)
    np.testing.assert_allclose(cells_GS.mean(axis=0), scores.values_QS.mean(axis=0))
    both_GS = group_cells([scores, other])
    assert both_GS.shape == (50, 3)
    expected = (scores.values_QS.mean(axis=0) + other.values_QS.mean(axis=0)) / 2
    np.testing.assert_allclose(both_GS.mean(axis=0), expected)


def test_the_cell_of_a_group_with_one_answer_is_its_score():
    scores = AnswerScores(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), ("a", "b", "c"))
    np.testing.assert_allclose(group_cells([scores]), scores.values_QS)


def test_repeating_answers_of_a_group_does_not_change_confidence_intervals():
    scores = random_scores(40)
    twice = AnswerScores(np.repeat(scores.values_QS, 2, axis=0), tuple(np.repeat(scores.groups, 2)))
    one, other = confidence_intervals({"vqa": scores})["vqa"], confidence_intervals({"vqa": twice})["vqa"]
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))
    same_in_all_runs = np.repeat(twice.values_QS[:, :1], 3, axis=1)  # all runs are equal, so that only groups matter
    apart, together = (
        confidence_intervals({"vqa": AnswerScores(same_in_all_runs, groups)})["vqa"]
        for groups in (tuple(map(str, range(len(twice.groups)))), twice.groups)
    )
    assert apart.high - apart.low < 0.75 * (together.high - together.low)


def test_tasks_on_the_same_images_vary_together():
    scores = random_scores(40)
    apart = AnswerScores(scores.values_QS, tuple(f"other {name}" for name in scores.groups))
    alone = confidence_intervals({"vqa": scores})["vqa"]
    same = confidence_intervals({"vqa": scores, "gqa": scores})["mean"]
    assert (same.mean, same.low, same.high) == pytest.approx((alone.mean, alone.low, alone.high))
    independent = confidence_intervals({"vqa": scores, "gqa": apart})["mean"]
    assert independent.mean == pytest.approx(alone.mean)
    assert independent.high - independent.low < 0.95 * (alone.high - alone.low)


def test_confidence_intervals_stay_within_possible_scores():
    scores = random_scores(5, share=0.9)
    found = confidence_intervals({"vqa": scores, "caption": scores})
    assert list(found) == ["vqa", "caption"]  # accuracies and CIDEr have no mean
    assert list(confidence_intervals({"caption": scores, "tvc": scores})) == ["caption", "tvc", "mean"]
    assert found["vqa"].high <= 1.0 < found["caption"].high
    single = AnswerScores(scores.values_QS[:, :1], scores.groups)  # the bare model has a single run
    bare = confidence_intervals({"vqa": single})
    assert list(bare) == ["vqa"]  # the mean of one task is that task
    assert 0.0 <= bare["vqa"].low < bare["vqa"].mean == single.values_QS.mean()


def test_confidence_intervals_miss_the_truth_about_as_often_as_stated():
    """100 images, 3 runs that differ: the share of intervals that exclude 0 where there is no difference."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(300):
        names = np.repeat(np.arange(100), rng.integers(1, 7, 100))
        logits = rng.normal(0, 1.5, len(names)) + rng.normal(0, 1.0, 100)[names]
        one, other = (
            (rng.random((len(names), 3)) < 1 / (1 + np.exp(-logits[:, None] - rng.normal(0, 0.1, 3)))).astype(float)
            for _ in range(2)
        )
        scores = AnswerScores(one, tuple(map(str, names))).minus(AnswerScores(other, tuple(map(str, names))))
        found = confidence_intervals({"vqa": scores}, differences=True)["vqa"]
        missed += found.low > 0 or found.high < 0
    assert 0.005 < missed / 300 < 0.09


def test_gain_over_question_only():
    scores = {"vqa": random_scores(40, share=0.7), "caption": random_scores(40, prefix="c")}
    baseline = {"vqa": AnswerScores(np.zeros((len(scores["vqa"].groups), 1)), scores["vqa"].groups)}
    gained = points(confidence_intervals({"vqa": scores["vqa"]}, differences=True)["vqa"])
    assert gain_over_question_only("DoRA", scores, baseline).endswith(f": VQA {gained} points.")

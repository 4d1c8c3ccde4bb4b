"""Tables of methods beside each other, and intervals over questions that share a picture."""

import csv
import io
import shutil

import numpy as np
import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.comparison import FULL, Variant
from dora_mm.eval.vl.comparison import (
    AnswerScores,
    VLResult,
    answer_scores,
    group_cells,
    describe_sizes,
    gain_over_question_only,
    group_of,
    intervals,
    points,
    row_values,
    vl_contrasts_table,
    vl_results_csv,
    vl_results_table,
)
from dora_mm.eval.vl.metrics import score

LORA, DORA, HALF = Variant("lora", 4), Variant("dora", 4), Variant("dora", 2)


def example(number: int, *answers: str, picture: str = "a.jpg", raw: tuple[str, ...] = (), **changes) -> Example:
    fields = {"images": (picture,), "text": "What?", "answers": answers, "scores": (1.0,) * len(answers)}
    return Example(**{"id": str(number), **fields, "raw_answers": raw, **changes})


TEN = ("a dog",) * 2 + ("cat",) * 8
ROWS = {
    "vqa": [
        (example(0, "dog", "cat", raw=TEN), "dog"),
        (example(1, "cat", raw=TEN), "a cat"),
        (example(2, raw=("x",) * 10), "y"),
    ],
    "gqa": [(example(0, "left"), "left"), (example(1, "left"), "right"), (example(2, "no"), "no")],
    "nlvr2": [(example(n, "true", id=f"dev-1-{n}-0"), said) for n, said in enumerate(("true", "false", "true"))],
    "caption": [
        (example(0, "a dog runs over a field", "the dog is in a field"), "a dog runs in a field"),
        (example(1, "two red cats on a mat"), "a red cat on a mat"),
        (example(2, "nothing at all"), "something else"),
    ],
}
ROWS["tvc"] = ROWS["caption"]


@pytest.mark.parametrize("task", ROWS)
def test_the_mean_of_what_answers_are_worth_is_the_main_metric(task):
    if task in ("caption", "tvc") and shutil.which("java") is None:
        pytest.skip("caption metrics need Java")
    values = row_values(task, ROWS[task])
    assert values.shape == (3,)
    assert values.std() > 0
    assert 100 * values.mean() == pytest.approx(score(task, ROWS[task], meteor=False).value)
    scores = answer_scores(task, [ROWS[task], ROWS[task]])
    assert scores is not None
    assert scores.values_QS.shape == (3, 2)


def test_captions_that_cannot_be_scored_have_no_marks(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert answer_scores("caption", [ROWS["caption"]]) is None


def test_what_goes_together():
    assert group_of("vqa", example(1, picture="b.jpg")) == "b.jpg"
    pair = {"images": ("dev-850-2-img0.png", "dev-850-2-img1.png")}
    assert group_of("nlvr2", example(0, id="dev-850-2-1", **pair)) == "dev-850"
    assert group_of("nlvr2", example(0, id="17", **pair)) == "dev-850-2-img0.png dev-850-2-img1.png"


def random_marks(groups: int, trainings: int = 3, seed: int = 0, chance: float = 0.6, size: int = 7, start: str = ""):
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(groups), rng.integers(1, size, groups))
    likely = chance + rng.uniform(-0.2, 0.2, groups)[names]
    values = (rng.random((len(names), trainings)) < likely[:, None]).astype(float)
    return AnswerScores(values, tuple(f"{start}{name}" for name in names))


def test_cells_have_the_mean_of_all_answers_in_every_training():
    scores, other = random_marks(30), random_marks(20, seed=1, start="other ")
    cells_GS = group_cells([scores])
    assert cells_GS.shape == (30, 3)
    np.testing.assert_allclose(cells_GS.mean(axis=0), scores.values_QS.mean(axis=0))
    both_GS = group_cells([scores, other])
    assert both_GS.shape == (50, 3)
    expected = (scores.values_QS.mean(axis=0) + other.values_QS.mean(axis=0)) / 2
    np.testing.assert_allclose(both_GS.mean(axis=0), expected)


def test_one_answer_a_group_is_the_answer_itself():
    scores = AnswerScores(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), ("a", "b", "c"))
    np.testing.assert_allclose(group_cells([scores]), scores.values_QS)


def test_asking_the_same_twice_tells_nothing_new():
    scores = random_marks(40)
    twice = AnswerScores(np.repeat(scores.values_QS, 2, axis=0), tuple(np.repeat(scores.groups, 2)))
    one, other = intervals({"vqa": scores})["vqa"], intervals({"vqa": twice})["vqa"]
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))
    steady = np.repeat(twice.values_QS[:, :1], 3, axis=1)  # all trainings alike, so that pictures alone count
    apart, together = (
        intervals({"vqa": AnswerScores(steady, groups)})["vqa"]
        for groups in (tuple(map(str, range(len(twice.groups)))), twice.groups)
    )
    assert apart.high - apart.low < 0.75 * (together.high - together.low)


def test_tasks_on_the_same_pictures_vary_together():
    scores = random_marks(40)
    apart = AnswerScores(scores.values_QS, tuple(f"other {name}" for name in scores.groups))
    alone = intervals({"vqa": scores})["vqa"]
    same = intervals({"vqa": scores, "gqa": scores})["mean"]
    assert (same.mean, same.low, same.high) == pytest.approx((alone.mean, alone.low, alone.high))
    independent = intervals({"vqa": scores, "gqa": apart})["mean"]
    assert independent.mean == pytest.approx(alone.mean)
    assert independent.high - independent.low < 0.9 * (alone.high - alone.low)


def test_intervals_stay_within_what_is_possible():
    scores = random_marks(5, chance=0.9)
    found = intervals({"vqa": scores, "caption": scores})
    assert found["vqa"].high <= 1.0 < found["caption"].high
    single = AnswerScores(scores.values_QS[:, :1], scores.groups)  # the bare model has no trainings
    bare = intervals({"vqa": single})
    assert list(bare) == ["vqa"]  # the mean of one task is that task
    assert 0.0 <= bare["vqa"].low < bare["vqa"].mean == single.values_QS.mean()


def test_the_truth_is_missed_about_as_often_as_stated():
    """300 pictures, 3 trainings that differ: the share of intervals of no difference that exclude 0."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(300):
        names = np.repeat(np.arange(100), rng.integers(1, 7, 100))
        asked = rng.normal(0, 1.5, len(names)) + rng.normal(0, 1.0, 100)[names]
        one, other = (
            (rng.random((len(names), 3)) < 1 / (1 + np.exp(-asked[:, None] - rng.normal(0, 0.1, 3)))).astype(float)
            for _ in range(2)
        )
        scores = AnswerScores(one, tuple(map(str, names))).minus(AnswerScores(other, tuple(map(str, names))))
        found = intervals({"vqa": scores}, differences=True)["vqa"]
        missed += found.low > 0 or found.high < 0
    assert 0.005 < missed / 300 < 0.09


def better(scores: AnswerScores, gain: float) -> AnswerScores:
    return AnswerScores(scores.values_QS + gain, scores.groups)


def test_differences_are_paired_and_marked():
    vqa, gqa = random_marks(50), random_marks(50, seed=1, start="g")
    noisy = {"vqa": vqa, "gqa": gqa}
    scores = {
        FULL: {"vqa": random_marks(50, seed=0), "gqa": gqa},
        LORA: noisy,
        DORA: {"vqa": better(vqa, 0.02), "gqa": gqa},
        HALF: noisy,
    }
    table = vl_contrasts_table(4, scores)
    lines = table.splitlines()
    assert lines[0] == "| difference | VQA | GQA | mean |"
    assert lines[2] == "| DoRA, rank 4 - LoRA, rank 4 | 2.0 (2.0 to 2.0) ! | 0.0 (-7.1 to 7.1) | 1.0 (1.0 to 1.0) ! |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:6]] == [
        "DoRA, rank 2 - LoRA, rank 4",
        "DoRA, rank 4 - full fine-tuning",
        "LoRA, rank 4 - full fine-tuning",
    ]
    assert "4 of 12 intervals exclude 0 (marked !)" in table


def results() -> list[VLResult]:
    scores = {"gqa": random_marks(30, seed=1, start="g"), "vqa": random_marks(30)}
    single = {"vqa": AnswerScores(scores["vqa"].values_QS[:, :1], scores["vqa"].groups)}
    return [
        VLResult("untrained base", intervals(single)),
        VLResult("DoRA, rank 4", intervals(scores), 1234567, 5.9617, "0.001*", 0.1234, 2048.4),
    ]


def test_the_table_has_a_column_for_each_task_and_blanks_for_what_is_not_there():
    lines = vl_results_table(results()).splitlines()
    assert lines[0] == "|  | trainable | learning rate | VQA | GQA | mean | seconds a step | memory, MB |"
    bare, dora = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert bare[:3] == ["untrained base", "", ""]
    assert bare[4:] == ["", "", "", ""]
    assert dora[:3] == ["DoRA, rank 4", "5.96 %", "0.001*"]
    assert dora[3] == points(results()[1].scores["vqa"])
    assert dora[-2:] == ["0.123", "2,048"]


def test_the_csv_holds_the_same_numbers():
    bare, dora = csv.DictReader(io.StringIO(vl_results_csv(results())))
    scores = results()[1].scores
    for key in ("vqa", "gqa", "mean"):
        for end in ("mean", "low", "high"):
            assert float(dora[f"{key}_{end}"]) == pytest.approx(100 * getattr(scores[key], end), abs=1e-3)
    assert (dora["parameters"], dora["trainable_share"], dora["learning_rate"]) == ("1234567", "5.9617", "0.001*")
    assert (dora["seconds_per_step"], dora["peak_memory_mb"]) == ("0.1234", "2048")
    assert bare["gqa_mean"] == bare["mean_low"] == bare["parameters"] == bare["peak_memory_mb"] == ""


def test_what_a_method_adds_to_guessing():
    scores = {"vqa": random_marks(40, chance=0.7), "caption": random_marks(40, start="c")}
    nothing = {"vqa": AnswerScores(np.zeros((len(scores["vqa"].groups), 1)), scores["vqa"].groups)}
    gained = points(intervals({"vqa": scores["vqa"]}, differences=True)["vqa"])
    assert gain_over_question_only("DoRA", scores, nothing).endswith(f": VQA {gained} points.")
    assert describe_sizes(scores).startswith(f"VQA {len(scores['vqa'].groups)} answers in 40 groups; CIDEr ")

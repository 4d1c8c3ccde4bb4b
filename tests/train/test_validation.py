"""The best adapter, early stopping, the combined score of several tasks, and validation that was interrupted."""

from functools import partial
from math import exp

import pytest

from dora_mm.config.training import ValidationConfig
from dora_mm.config.vl import EvaluateConfig
from dora_mm.eval.vl.scores import VLScores
from dora_mm.tasks.held_out import by_loss
from dora_mm.train.checkpoint import checkpoints
from dora_mm.train.metrics import read_metrics
from dora_mm.train.validation import Validation, main_values, other_values, overall, task_qualities
from dora_mm.utils.run_directory import RunDirectory
from tests.shared.small_training import interrupt_at, new_run, small_training


def validation(run, rounds, saved=None, *, by=False, resumed_step=0, writes=True, **config) -> Validation:
    """Of one task, vqa, with the values of each round."""
    values, qualities = iter(rounds), partial(task_qualities, {"vqa": by})
    save = [].append if saved is None else saved.append
    config = ValidationConfig(**config)
    return Validation(run, config, lambda: next(values), qualities, save, resumed_step, writes=writes)


def test_all_metrics_are_logged_and_the_main_ones_decide(tmp_path):
    run, saved = new_run(tmp_path / "run"), []
    rounds = [{"accuracy": 50.0, "accuracy (lavis)": 60.0}, {"accuracy": 49.0, "accuracy (lavis)": 70.0}]
    scores = [{"vqa": VLScores("accuracy", metrics)} for metrics in rounds]
    validate = validation(run, [main_values(found) | other_values(found) for found in scores], saved)
    for step in (1, 2):
        validate(step)
    validate.close()
    assert saved == [run.path / "best" / "vqa", run.path / "best" / "overall"]
    first, _ = read_metrics(run.path / "validation" / "metrics.jsonl")
    assert first == {"step": 1, "vqa": 50.0, "overall": 50.0, "vqa/accuracy (lavis)": 60.0}


def test_a_loss_decides_where_the_metric_is_exact_match_of_sentences(tmp_path):
    chosen = [("chat", None), ("vqa", None), ("vqa", "loss"), ("chat", "metric")]
    assert [by_loss(EvaluateConfig(best_by=by), task) for task, by in chosen] == [True, False, True, False]  # type: ignore[arg-type]
    run, saved = new_run(tmp_path / "run"), []
    validate = validation(
        run, [{"vqa": v, "vqa/loss": loss} for v, loss in ((0, 2.0), (0, 1.0), (9, 3.0))], saved, by=True
    )
    for step in (1, 2, 3):
        validate(step)
    assert len(saved) == 4
    assert validate.best_step == 2
    both = task_qualities({"a": True, "b": False}, {"a/loss": 1.0, "b": 50.0})
    assert both == pytest.approx({"a": 100 * exp(-1), "b": 50.0, "overall": (50 * 100 * exp(-1)) ** 0.5})


ROUNDS = [{"vqa": float(value)} for value in (1, 3, 2, 3, 1, 9)]


def test_it_is_over_after_as_many_validations_without_a_better_one_as_patience_says(tmp_path):
    validate = validation(new_run(tmp_path / "run"), ROUNDS, every=2, patience=3)
    over = []
    for step in range(1, 7):
        validate(step)
        over.append(validate.should_stop())
    assert over == [False, False, False, False, True, False]
    never = validation(new_run(tmp_path / "never"), ROUNDS, every=2)
    for step in range(1, 7):
        never(step)
        assert not never.should_stop()


def test_a_resumed_validation_and_one_that_only_reads_decide_as_the_first(tmp_path):
    run = new_run(tmp_path / "run")
    validate = validation(run, ROUNDS, every=2, patience=3)
    for step in range(1, 6):
        validate(step)
    validate.close()
    for settings in ({"writes": False}, {}):  # the second one drops the last row
        early = validation(run, ROUNDS[4:], resumed_step=4, every=2, patience=3, **settings)
        assert not early.should_stop()
        early(5)
        assert early.should_stop()
    assert [row["step"] for row in read_metrics(run.path / "validation" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stop", [5, 6])
def test_a_training_ends_early_and_a_resumed_one_stays_ended(tmp_path, stop):
    """Also if it was interrupted in between; and goes on where it is told to."""

    def train(path, interrupted=False, **config):
        run = RunDirectory(path) if path.exists() else new_run(path)
        done = checkpoints(run.checkpoints)
        resumed = int(done[-1].name[-6:]) if done else 0
        values = iter([{"vqa": 9.0 if step == 2 else 1.0} for step in range(resumed + 1, 13) if step % 2 == 0])
        qualities = partial(task_qualities, {"vqa": False})
        validate = Validation(
            run, ValidationConfig(every=2, **config), lambda: next(values), qualities, lambda _: None, resumed
        )

        def on_step_end(step):
            if validate.is_due(step, 12):
                validate(step)
            if interrupted and step == stop:
                raise KeyboardInterrupt

        return small_training(run, schedule="constant").fit(on_step_end=on_step_end, should_stop=validate.should_stop)

    assert train(tmp_path / "run", patience=2) == 6
    assert train(tmp_path / "run", patience=2) == 6
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "interrupted", interrupted=True, patience=2)
    assert train(tmp_path / "interrupted", patience=2) == 6
    assert train(tmp_path / "run") == 12


def test_the_overall_score_does_not_depend_on_the_scales_of_the_metrics():
    """Figures from the scenes: one rate is 8 % worse than the other in captions and 15 % better in questions."""
    better, worse = {"vqa": 59.4, "caption": 208.6}, {"vqa": 51.6, "caption": 226.7}
    assert sum(better.values()) < sum(worse.values())
    assert overall(better) > overall(worse)
    assert overall({"vqa": 50.0, "caption": 200.0}) == pytest.approx(100.0)
    assert overall({"vqa": 60.4}) == pytest.approx(60.4)
    assert overall({"vqa": 0.0, "caption": 200.0}) == 0.0


def test_what_was_interrupted_while_it_observed_a_step_observes_it_again(tmp_path):
    run, observed = new_run(tmp_path / "run"), []

    def interrupted(step):
        interrupt_at(5)(step)
        observed.append(step)

    with pytest.raises(KeyboardInterrupt):
        small_training(run).fit(on_step_end=interrupted)
    small_training(run).fit(on_step_end=observed.append)
    assert observed == [*range(1, 13)]

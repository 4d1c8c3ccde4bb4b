"""The learning rate, and what becomes of it in a run that is extended."""

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch import nn
from transformers.optimization import get_wsd_schedule

from dora_mm.config.training import OptimizerConfig, ScheduleConfig, TrainConfig, check_training
from dora_mm.train.schedule import Schedule
from tests.shared.small_training import metrics, new_run, small_training


def extended(path, before, after, **settings):
    """The training of a run that had `before` steps and goes on to `after`, at its end."""
    run = new_run(path)
    small_training(run, steps=before, **settings).fit()
    training = small_training(run, steps=after, **settings)
    assert training.fit() == after
    return training, run


@pytest.mark.parametrize("warmup", [None, {"warmup_steps": 3}])
def test_a_constant_rate_makes_an_extended_run_equal_to_a_longer_one(tmp_path, caplog, warmup):
    training, _ = extended(tmp_path / "parts", 5, 12, schedule="constant", warmup=warmup)
    longer = small_training(new_run(tmp_path / "longer"), steps=12, schedule="constant", warmup=warmup)
    longer.fit()
    for one, two in zip(training.network.parameters(), longer.network.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [each for each in caplog.records if each.levelname == "WARNING"] == []


@pytest.mark.parametrize("name", ["cosine", "linear", "restarts", "polynomial", "warmup_stable_decay"])
def test_other_rates_go_on_as_in_a_run_of_the_new_length_with_a_warning(tmp_path, caplog, name):
    settings = {"log_every": 1, "warmup": {"decay_ratio": 0.5} if name == "warmup_stable_decay" else None}
    _, run = extended(tmp_path / "parts", 4, 8, schedule=name, **settings)
    longer = new_run(tmp_path / "longer")
    small_training(longer, steps=8, schedule=name, **settings).fit()
    rates, of_longer = ([row["lr"] for row in metrics(each)] for each in (run, longer))
    assert rates[4:] == of_longer[4:]
    assert rates[:4] != of_longer[:4]
    assert f"schedule.name {name} now ends at step 8" in caplog.text
    assert "the 4 finished steps had the rates of a run of 4" in caplog.text


def test_no_warning_while_the_rate_still_rises(tmp_path, caplog):
    extended(tmp_path / "run", 4, 8, schedule="cosine", warmup={"warmup_steps": 4})
    assert [each for each in caplog.records if each.levelname == "WARNING"] == []


def test_an_extended_run_is_not_warmed_up_again(tmp_path):
    _, run = extended(tmp_path / "run", 4, 20, schedule="constant", warmup={"warmup_ratio": 0.5}, log_every=1)
    assert [row["lr"] for row in metrics(run)] == pytest.approx([0, 0.025, *[0.05] * 18])


def test_no_warning_while_the_rate_is_constant(tmp_path, caplog):
    extended(tmp_path / "run", 4, 8, schedule="warmup_stable_decay", warmup={"decay_ratio": 0.01})
    assert [each for each in caplog.records if each.levelname == "WARNING"] == []


@pytest.mark.parametrize(
    ("settings", "steps", "other"),
    [
        ({"name": "constant"}, (10, 10, 20), False),
        ({"name": "constant", "warmup_steps": 5}, (10, 10, 20), False),
        ({"name": "constant", "warmup_steps": 5}, (10, 3, 20), False),
        ({"name": "constant", "warmup_ratio": 0.03}, (10, 10, 20), True),  # no step of 10, and one of 20
        ({"name": "constant", "warmup_ratio": 0.2}, (10, 10, 11), False),  # two steps of both
        ({"name": "constant", "warmup_ratio": 0.5}, (10, 4, 20), True),
        ({"name": "constant", "warmup_ratio": 0.5}, (10, 1, 20), False),  # the first step has the rate 0
        ({"name": "warmup_stable_decay", "decay_ratio": 0.2}, (10, 8, 20), False),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.2}, (10, 10, 20), True),
        ({"name": "warmup_stable_decay", "warmup_ratio": 0.1, "decay_ratio": 0.2}, (10, 8, 20), True),
        ({"name": "cosine"}, (10, 10, 20), True),
        ({"name": "cosine"}, (10, 1, 20), False),
        ({"name": "cosine", "warmup_steps": 5}, (10, 5, 20), False),
        ({"name": "linear"}, (10, 5, 20), True),
    ],
)
def test_a_warning_comes_where_finished_steps_had_other_rates(settings, steps, other, caplog):
    before, done, after = steps
    stopped = gone_on(Schedule(sgd(), ScheduleConfig(**settings), before), done)
    longer = Schedule(sgd(), ScheduleConfig(**settings), after)
    of_longer = [longer.factor(step) for step in range(done)]
    longer.load_state_dict(stopped.state_dict())
    assert ([stopped.factor(step) for step in range(done)] != of_longer) == other
    assert ([record.levelname for record in caplog.records] == ["WARNING"]) == other
    caplog.clear()
    again = Schedule(sgd(), ScheduleConfig(**settings), after)
    again.load_state_dict(gone_on(longer, 2).state_dict())
    assert caplog.messages == []  # said once


def gone_on(schedule, steps):
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
    return schedule


def rates(schedule) -> list[float]:
    found = []
    for _ in range(12):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "restarts"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_diffusers(name, warmup):
    shape = {"constant": "constant_with_warmup", "restarts": "cosine_with_restarts"}.get(name, name)
    theirs = get_scheduler(shape, sgd(), num_warmup_steps=warmup, num_training_steps=11, num_cycles=4)
    assert rates(Schedule(sgd(), ScheduleConfig(name=name, warmup_steps=warmup), 11)) == rates(theirs)


def test_rates_of_a_polynomial_are_those_of_diffusers():
    """Up to rounding: they multiply by the rate, and divide by it again."""
    theirs = get_polynomial_decay_schedule_with_warmup(sgd(), 3, 11, lr_end=0.0, power=1.5)
    config = ScheduleConfig(name="polynomial", warmup_steps=3, power=1.5)
    assert rates(Schedule(sgd(), config, 11)) == pytest.approx(rates(theirs), rel=1e-12)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_rates_that_decay_at_the_end_are_those_of_transformers(ratio):
    warmup, decay = 2, round(ratio * 11)
    if ratio == 1.0:  # the warm-up comes first
        warmup = 0
    theirs = get_wsd_schedule(sgd(), warmup, decay, num_training_steps=11)
    config = ScheduleConfig(name="warmup_stable_decay", warmup_steps=warmup, decay_ratio=ratio)
    assert rates(Schedule(sgd(), config, 11)) == rates(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": {"name": "cosine", "cycles": 3}},
            "schedule.cycles has no effect: it is of schedule.name res",
        ),
        (
            {"optimizer": {"name": "schedule_free"}, "schedule": {"name": "linear"}},
            "needs schedule.name constant",
        ),
        (
            {"optimizer": {"name": "prodigy", "lr": 1.0, "b_lr_ratio": 4.0}},
            "optimizer.b_lr_ratio needs optimizer.name adamw",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    optimizer = OptimizerConfig(**{"lr": 0.1, **changes.get("optimizer", {})})
    train = TrainConfig(steps=9, batch_size=1)
    (problem,) = check_training(optimizer, ScheduleConfig(**changes.get("schedule", {})), train)
    assert message in problem

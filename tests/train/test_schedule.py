"""The learning rate, and what becomes of it in a run that is extended."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from dora_mm.config.training import ScheduleConfig
from dora_mm.train.schedule import build_schedule
from tests.train.small import metrics, new_run, small_training


def extended(path, before, after, **settings):
    """The training of a run that had `before` steps and goes on to `after`, at its end."""
    run = new_run(path)
    small_training(run, steps=before, **settings).fit()
    training = small_training(run, steps=after, **settings)
    assert training.fit() == after
    return training, run


def test_a_constant_rate_makes_an_extended_run_equal_to_a_longer_one(tmp_path, caplog):
    training, _ = extended(tmp_path / "parts", 5, 12, schedule="constant")
    longer = small_training(new_run(tmp_path / "longer"), steps=12, schedule="constant")
    longer.fit()
    for one, two in zip(training.network.parameters(), longer.network.parameters(), strict=True):
        assert torch.equal(one, two)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_other_rates_go_on_as_in_a_run_of_the_new_length_with_a_warning(tmp_path, caplog, name):
    _, run = extended(tmp_path / "parts", 4, 8, schedule=name, log_every=1)
    longer = new_run(tmp_path / "longer")
    small_training(longer, steps=8, schedule=name, log_every=1).fit()
    rates, of_longer = ([row["lr"] for row in metrics(each)] for each in (run, longer))
    assert rates[4:] == of_longer[4:]
    assert rates[:4] != of_longer[:4]
    assert f"schedule.name {name} now ends at step 8" in caplog.text
    assert "the 4 finished steps had the rates of a run of 4" in caplog.text


def test_no_warning_while_the_rate_still_rises(tmp_path, caplog):
    extended(tmp_path / "run", 4, 8, schedule="cosine", warmup={"warmup_steps": 4})
    assert caplog.text == ""


def test_an_extended_run_is_not_warmed_up_again(tmp_path):
    _, run = extended(tmp_path / "run", 4, 20, schedule="constant", warmup={"warmup_ratio": 0.5}, log_every=1)
    assert [row["lr"] for row in metrics(run)] == pytest.approx([0, 0.025, *[0.05] * 18])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_diffusers(name, warmup):
    def rates(schedule):
        found = []
        for _ in range(12):
            found.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return found

    def optimizer():
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)

    shape = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(shape, optimizer(), num_warmup_steps=warmup, num_training_steps=11)
    assert rates(build_schedule(optimizer(), ScheduleConfig(name=name, warmup_steps=warmup), 11)) == rates(theirs)

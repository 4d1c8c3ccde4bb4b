"""Drawn trainings that are killed and resumed end as uninterrupted ones: in every bit of all that they leave."""

import signal

import pytest

from dora_mm.utils.partials import PARTIAL
from tests.train.random_runs import differences, everything, launch, random_run_of

FEW = 1  # in one process; number 1 is in two, 2 and 3 have the other two optimizers


@pytest.mark.parametrize("number", [*range(FEW), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FEW, 60))])
def test_killed_and_resumed_it_is_as_uninterrupted(number, tmp_path):
    """Real processes, and SIGKILL: in a loss, behind a step, before a validation, or in the writing of a checkpoint."""
    for package in ("schedulefree", "prodigyopt"):
        pytest.importorskip(package)
    config, kills = random_run_of(number)
    whole, run, what = tmp_path / "whole", tmp_path / "killed", f"{config}, {kills}"
    assert launch(config, whole, tmp_path / "whole-end") == [0] * config.num_processes, what
    codes = []
    for index, kill in enumerate(kills):
        codes += launch(config, run, tmp_path / f"part-{index}", resume=index > 0, kill=kill)
    last = launch(config, run, tmp_path / "killed-end", resume=True)
    assert last == [0] * config.num_processes, what
    assert -signal.SIGKILL in codes, what
    ranks = range(config.num_processes)
    left = [everything(folder, [tmp_path / f"{folder.name}-end-{n}.pt" for n in ranks]) for folder in (whole, run)]
    assert differences(*left) == [], what
    assert not list(run.rglob(f"*{PARTIAL}")), what

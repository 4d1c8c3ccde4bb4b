"""Joining processes; two of them are in tests/pipelines/test_two_processes.py."""

import pytest
from accelerate import Accelerator

from dora_mm.config.training import TrainConfig
from dora_mm.train.processes import join_processes, main_process_first

TRAIN = TrainConfig(steps=1, batch_size=1)


def test_a_single_process_is_the_main_one():
    accelerator = join_processes(TRAIN)
    assert accelerator.num_processes == 1
    with main_process_first(accelerator):
        assert accelerator.is_main_process


def test_processes_that_cannot_train_together_are_refused(monkeypatch):
    Accelerator(cpu=True)  # as on a device for which accelerate knows a single process only
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but on cpu only 1 can train together"):
        join_processes(TRAIN)

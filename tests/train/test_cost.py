"""The time and memory of a run, as reported in its summary."""

import subprocess
import sys

import pytest
import torch

from dora_mm.train.cost import peak_memory_mb, seconds_per_step


def rows(*times):
    return [{"step": step, "seconds": seconds} for step, seconds in times]


def test_slow_first_steps_validations_and_pauses_do_not_count():
    # 10 steps take 1 s; the first 10 took 5 s, a validation 30 s, and the run was resumed after step 40
    found = rows((10, 5.0), (20, 6.0), (30, 37.0), (40, 38.0), (50, 1.5), (60, 2.5), (70, 3.5))
    assert seconds_per_step(found) == pytest.approx(0.1)


def test_a_single_row_is_enough():
    assert seconds_per_step(rows((4, 2.0))) == 0.5
    assert (
        seconds_per_step(rows((4, 2.0), (8, 1.0))) == 0.125
    )  # the run was resumed after step 4, which restarts the clock


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, its memory is reported instead")
@pytest.mark.slow
def test_memory_is_that_of_the_process_and_not_of_its_parent():
    held = bytearray(600 * 2**20)
    code = (
        "from dora_mm.train.cost import peak_memory_mb as peak; "
        "before = peak(); more = bytearray(300 << 20); print(before, peak())"
    )
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert peak_memory_mb() > len(held) / 2**20
    assert 50 < before < 600
    assert 250 < after - before < 350

"""Time and memory of a run, as its summary has them."""

import subprocess
import sys

import pytest
import torch

from dora_mm.train.cost import peak_memory_mb, seconds_per_step


def rows(*times):
    return [{"step": step, "seconds": seconds} for step, seconds in times]


def test_a_slow_start_a_validation_and_a_resumed_run_do_not_count():
    # 10 steps take 1 s; the first 10 took 5 s, a validation 30 s, and after step 40 the run began again
    found = rows((10, 5.0), (20, 6.0), (30, 37.0), (40, 38.0), (50, 1.5), (60, 2.5), (70, 3.5))
    assert seconds_per_step(found) == pytest.approx(0.1)


def test_one_row_is_all_there_is():
    assert seconds_per_step(rows((4, 2.0))) == 0.5
    assert seconds_per_step(rows((4, 2.0), (8, 1.0))) == 0.125  # resumed at once


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the process, where there is no GPU")
def test_memory_is_of_the_process_and_not_of_the_one_that_started_it():
    held = bytearray(600 * 2**20)
    code = (
        "from dora_mm.train.cost import peak_memory_mb as peak; "
        "before = peak(); more = bytearray(300 << 20); print(before, peak())"
    )
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert peak_memory_mb() > len(held) / 2**20
    assert 50 < before < 600
    assert 250 < after - before < 350

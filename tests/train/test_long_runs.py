"""Trainings keep no more memory and no more open files from step to step."""

import pytest

from tests.benchmarks.bench_long_runs import TRAININGS, watched

MOST = 30  # MB that are allocated late: what contact sheets and validations load once, and pools that grow


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_memory_and_open_files_stay(name, tmp_path):
    looks = list(watched(name, 150, tmp_path))
    assert len(looks) >= 5
    first, last = looks[len(looks) // 3], looks[-1]
    assert last.megabytes - first.megabytes < MOST
    assert last.open_files <= first.open_files + 1  # a checkpoint that is being written

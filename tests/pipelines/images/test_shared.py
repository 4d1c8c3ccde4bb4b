"""Several processes of torchrun generate one job: the files of one process, whatever is killed; and one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pipelines.images.test_grid import styles  # noqa: F401
from tests.pipelines.images.test_sample import content, style  # noqa: F401

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


def python(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)


def share(folder, kills, recipe, *command):
    """The files of a run that one process has generated, and of one that was shared, and killed that many times."""
    done = python(folder, "tests.pipelines.images.shared_generation", kills, recipe, *command)
    assert done.returncode == 0, done.stderr[-5000:]
    (between,) = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    return content(folder / "whole"), content(folder / "shared"), between


def test_a_shared_job_that_is_killed_at_random_ends_with_the_files_of_one_process(style, tmp_path):  # noqa: F811
    rows = [f"thing {number},1-4,{number % 3 / 2}\n" for number in range(10)]
    (tmp_path / "jobs.csv").write_text("prompt,seed,strength\n" + "".join(rows))
    settings = ["--set", f"adapter.path={style}", "steps=2", "batch_size=4"]
    whole, shared, between = share(tmp_path, 20, "sample", "sample", "jobs.csv", *settings)
    assert len([name for name in whole if name.endswith(".png")]) == 40 + 1
    assert shared == whole
    assert between > 4  # most kills meet a job that is neither new nor finished


def test_a_shared_grid(styles, tmp_path):  # noqa: F811
    columns = {"name": "adapter", "values": styles}
    rows = {"name": "seed", "values": [1, 2]}
    values = {"pipeline": "grid", "prompt": "a bus", "steps": 1, "rows": rows, "columns": columns}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    whole, shared, _ = share(tmp_path, 1, "grid", "grid", "grid.yaml", "--set", "batch_size=1")
    assert "sheet.png" in whole
    assert shared == whole


def torchrun(folder, *arguments):
    started = "torch.distributed.run", "--standalone", "--nproc-per-node", 3, "-m", "dora_mm"
    return python(folder, *started, *arguments)


def test_three_processes_have_one_message(style, tmp_path):  # noqa: F811
    """Of a mistake that each finds before it knows the others, and of one that the main process finds alone."""
    (tmp_path / "bad.csv").write_text("prompt,sed\na,1\n")
    (tmp_path / "good.csv").write_text("prompt\na\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for arguments, message in (
        (["bad.csv"], "bad.csv: line 1: unknown column 'sed', did you mean 'seed'?"),
        (
            ["good.csv", "--set", f"adapter.path={style}", "output=other"],
            "output other exists already and is not a run directory: choose another folder",
        ),
    ):
        done = torchrun(tmp_path, "sample", *arguments)
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if line.startswith("dora-mm: ")] == [f"dora-mm: {message}"]

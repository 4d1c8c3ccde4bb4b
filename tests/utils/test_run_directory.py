"""Run directories."""

import json

import pytest
import torch

from dora_mm.utils.run_directory import RunDirectory


def test_run_directories_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (RunDirectory.create("demo", "seed: 1\n") for _ in range(2))
    assert (str(one.path), str(two.path)) == ("runs/demo/001", "runs/demo/002")
    assert (one.path / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((one.path / "versions.json").read_text())["torch"] == torch.__version__
    with pytest.raises(ValueError, match="exists"):
        RunDirectory.create("demo", "", output=str(one.path))
    with pytest.raises(ValueError, match="not a run directory"):
        RunDirectory.resume(tmp_path)

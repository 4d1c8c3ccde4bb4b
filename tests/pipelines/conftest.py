"""Fixtures of several files here."""

import shutil
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main


@pytest.fixture
def stopped(tmp_path):
    """Trains; returns the run as a stop after its second step leaves it."""

    def run(**values) -> Path:
        config = {
            "pipeline": "train_vl",
            "output": str(tmp_path / "whole"),
            "adapter": {"rank": 2},
            "optimizer": {"lr": 0.02},
            "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
            **values,
        }
        config["data"] |= {"tables": str(tmp_path / "tables")}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(tmp_path / "config.yaml")]) == 0
        stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
        shutil.rmtree(stopped / "checkpoints" / "step-000004")
        (stopped / "summary.json").unlink()
        return stopped

    return run

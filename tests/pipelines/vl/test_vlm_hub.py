"""Trainings of models of the hub, from its cache."""

import shutil

import huggingface_hub.constants
import pytest
import yaml
from safetensors.torch import load_file, save_file

from dora_mm.cli import main
from dora_mm.config.loader import load_config
from dora_mm.formats import read
from tests.shared.data.vlm_rows import write_conversations, write_images

NAME, FIRST, SECOND = "someone/tiny", "a" * 40, "b" * 40


@pytest.fixture
def repository(tiny_vlm, tmp_path, monkeypatch):
    found = tmp_path / "hub" / "models--someone--tiny"
    (found / "refs").mkdir(parents=True)
    shutil.copytree(tiny_vlm("llava"), found / "snapshots" / FIRST)
    (found / "refs" / "main").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def test_a_run_goes_on_with_the_commit_that_it_was_started_with(repository, tmp_path):
    images = write_images(tmp_path)
    config = {
        "pipeline": "train_vl",
        "model": {"path": NAME},
        "adapter": {"rank": 2},
        "data": {**write_conversations(tmp_path, images), "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 1, "batch_size": 2},
        "evaluate": {"max_new_tokens": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert load_config(str(tmp_path / "run" / "config.yaml")).model.revision == FIRST
    assert read(tmp_path / "run" / "adapter")[1]["base_revision"] == FIRST

    newer = shutil.copytree(repository / "snapshots" / FIRST, repository / "snapshots" / SECOND)
    changed = {key: value + 1 for key, value in load_file(newer / "model.safetensors").items()}
    save_file(changed, newer / "model.safetensors", {"format": "pt"})
    (repository / "refs" / "main").write_text(SECOND)
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]) == 0
    assert main(["ask", NAME, str(images / "wide.png"), "What?", "--adapter", str(tmp_path / "run")]) == 0


def test_a_folder_has_no_revisions(tiny_vlm, tmp_path, capsys):
    config = {
        "pipeline": "eval_vl",
        "model": {"path": str(tiny_vlm("llava")), "revision": "main"},
        "data": {"valid": write_conversations(tmp_path, write_images(tmp_path))["valid"]},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "config.yaml")]) == 2
    assert "is not a model of the hub, so it has no revisions" in capsys.readouterr().err

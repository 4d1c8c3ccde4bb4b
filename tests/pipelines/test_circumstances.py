"""Trainings that go on under other circumstances, as whole commands; jobs and evaluations have theirs beside them."""

import json

import pytest
import yaml

from dora_mm.cli import main
from tests.shared.data.chats import messages
from tests.shared.data.vlm_rows import write_images

pytestmark = pytest.mark.slow
OTHER = "computed under other circumstances, which may change last bits: MKL_CBWR none is COMPATIBLE"


def resumed(run, monkeypatch, caplog, *changes):
    """The warnings and the records of a training that goes on with another variable."""
    start = json.loads((run / "versions.json").read_text())
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    caplog.clear()
    assert main(["train", "--resume", str(run), *changes]) == 0
    assert json.loads((run / "versions.json").read_text()) == start
    recorded = json.loads((run / "circumstances.json").read_text())
    assert recorded == {"2": {**start, "MKL_CBWR": "COMPATIBLE"}}
    return [message for message in caplog.messages if "circumstances" in message]


def test_a_training_of_images_and_what_it_has_kept(tmp_path, tiny_folder, image_folder, monkeypatch, caplog):
    latents, texts = tmp_path / "latents", tmp_path / "texts"
    data = {"folder": str(image_folder), "resolution": 64, "latent_cache": str(latents), "text_cache": str(texts)}
    values = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2},
        "data": data,
        "optimizer": {"lr": 0.01},
        "train": {"steps": 2, "batch_size": 2},
        "sample": {"prompts": []},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    said = resumed(tmp_path / "run", monkeypatch, caplog, "--set", "train.steps=3")
    images, captions = (len(list(folder.rglob("*.safetensors"))) for folder in (latents, texts))
    assert sorted(said) == sorted(
        [
            f"2 of 2 finished steps were {OTHER}",
            f"{images} of {images} latents in {latents} were {OTHER}",
            f"{captions} of {captions} encoded captions in {texts} were {OTHER}",
        ]
    )


def test_a_training_of_questions(stopped, tmp_path, tiny_vlm, monkeypatch, caplog):
    images = sorted(write_images(tmp_path).glob("*.png"))
    rows = [{"images": [str(each)], "messages": messages("<image>What?", "noise")} for each in images]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"train": {"format": "chat", "file": str(tmp_path / "rows.json"), "images": str(tmp_path)}}
    run = stopped(model={"path": str(tiny_vlm("qwen2_5_vl"))}, data=data)
    assert resumed(run, monkeypatch, caplog) == [f"2 of 2 finished steps were {OTHER}"]

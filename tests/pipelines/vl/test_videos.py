"""Rows with videos, from a file to answers: trained, resumed, scored, asked, and named where one is broken."""

import json
import shutil

import pytest
import yaml

from dora_mm.cli import main
from tests.shared.data.chats import messages
from tests.shared.data.videos import write_video
from tests.shared.data.vlm_rows import write_images
from tests.shared.killed import assert_same_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, videos of two lengths and one that is cut off, and conversations about them."""
    found = write_images(tmp_path_factory.mktemp("videos"))
    write_video(found / "short.mp4", frames=10)
    write_video(found / "long.mp4", frames=30)
    (found / "broken.mp4").write_bytes((found / "long.mp4").read_bytes()[:900])
    rows = [
        {"messages": messages("<video>What is it?", "A dog."), "videos": ["short.mp4"]},
        {
            "messages": messages("<image>\nWhat?", "Noise.", "And <video>?", "It too."),
            "image": "wide.png",
            "video": "long.mp4",
        },
        {"messages": messages("<image>What is it?", "Noise."), "images": ["tall.png"]},
        {"messages": messages("What is one and one?", "Two.")},
        {"messages": messages("<video>What is it?", "A cat."), "videos": ["broken.mp4"]},
    ]
    (found / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return found


def written(folder, base, tmp_path, name, **train):
    source = {"format": "chat", "file": str(folder / "rows.jsonl"), "images": str(folder)}
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(base), "fps": 2, "max_frames": 4},
        "adapter": {"rank": 2},
        "data": {"train": source, "valid": {**source}, "on_bad_data": "skip", "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 3, "batch_size": 4, "checkpoint_every": 1, **train},
        "evaluate": {"max_new_tokens": 3},
        "output": str(tmp_path / name),
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / f"{name}.yaml"


def test_rows_with_videos_train_resume_and_are_scored(folder, tiny_vlm, tmp_path, capsys, caplog):
    base = tiny_vlm("qwen3_vl")
    config = written(folder, base, tmp_path, "whole")
    assert main(["train", str(config), "--dry-run", "--decode"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 5 images are broken" in shown
    assert "broken.mp4 is not a complete video" in shown
    assert main(["train", str(config)]) == 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["rows_left_out"] > 0
    assert "broken.mp4 is not a complete video" in caplog.text
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for left in ("checkpoints/step-000003", "checkpoints/step-000002", "adapter", "validation", "best"):
        shutil.rmtree(killed / left, ignore_errors=True)
    (killed / "summary.json").unlink()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights("step-000003", tmp_path / "whole", killed)

    capsys.readouterr()
    run, long = str(tmp_path / "whole"), str(folder / "long.mp4")
    assert main(["ask", str(base), long, "What is it?", "--adapter", run, "--max-new-tokens", "4"]) == 0
    assert "with adapter:" in capsys.readouterr().out
    assert main(["ask", str(base), str(folder / "broken.mp4"), "What is it?"]) == 2
    assert "broken.mp4 is not a complete video" in capsys.readouterr().err
    values = yaml.safe_load(config.read_text())
    del values["data"]["train"]
    scored = {"pipeline": "eval_vl", "model": values["model"], "data": values["data"], "adapter": run}
    scored |= {"decode": {"max_new_tokens": 3}, "output": str(tmp_path / "scored")}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(scored))
    assert main(["eval", str(tmp_path / "eval.yaml")]) == 0
    assert "data:image/webp" in (tmp_path / "scored" / "examples.html").read_text()

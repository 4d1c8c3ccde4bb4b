"""Trainings on data as it lies on disks: a snapshot of the hub with two splits, a folder of images with captions."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dora_mm.cli import main
from tests.documented.trl_labels import PAGE
from tests.shared.data.chats import messages
from tests.shared.data.tool_rows import ROWS
from tests.shared.data.vl_files import write_lines
from tests.shared.data.vlm_rows import write_images

TEMPLATES = json.loads(PAGE.read_text(encoding="utf-8"))["templates"]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "pictures").mkdir()
    return write_images(tmp_path / "pictures")


@pytest.fixture
def snapshot(tmp_path, images):
    """A training split with what conversations may have, and a test split of another shape."""
    whole = {"bytes": (images / "wide.png").read_bytes(), "path": None}
    frames = [str(images / "square.png")] * 3
    boxes = {"bbox": [[1, 2, 5, 6]], "ref": ["a dot"]}
    rows = [
        {"images": [whole], "messages": messages("<image>Where is <ref-object>?", "<bbox>"), "objects": boxes},
        {"images": [whole], "messages": messages("<image>What?", "", "And?", "so")},
        {"videos": [frames], "messages": messages("<video>What moves?", "nothing")},
        {"messages": messages("Again?", "")},
    ]
    folder = tmp_path / "snapshot" / "data"
    folder.mkdir(parents=True)
    keys = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in keys} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist([{"question": "Q"}]), folder / "test-00000-of-00001.parquet")
    return folder.parent


def config(tmp_path, base, **data):
    values = {
        "pipeline": "train_vl",
        "model": {"path": str(base)},
        "adapter": {"rank": 2},
        "data": {"tables": str(tmp_path / "tables"), **data},
        "optimizer": {"lr": 0.02},
        "train": {"steps": 3, "batch_size": 2, "log_every": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


@pytest.mark.slow
def test_a_snapshot_trains_on_the_split_that_is_named(tiny_vlm, tmp_path, snapshot, capsys, caplog):
    base = tmp_path / "model"
    tools = write_lines(tmp_path / "tools.jsonl", [ROWS["OpenAI"]])
    source = {"format": "chat", "file": str(snapshot)}
    more = [{"format": "chat", "file": str(tools)}]
    shutil.copytree(tiny_vlm("qwen3_vl"), base)
    (base / "chat_template.jinja").write_text(TEMPLATES["qwen3_vl"])
    path = config(tmp_path, base, train=source, more=more)
    assert main(["train", path]) == 2
    assert (
        "snapshot has several splits: choose one, as in split: train; there are train (train-000"
        in capsys.readouterr().err
    )
    assert main(["train", path, "--set", "data.train.split=train", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "empty answers, not learned" in shown
    assert main(["train", path, "--set", "data.train.split=train"]) == 0
    assert "2 answers are empty and not learned" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows_left_out"] == 0


@pytest.mark.slow
def test_a_folder_of_images_is_learned_and_scored(tiny_vlm, tmp_path, images):
    rows = [{"file_name": path.name, "text": f"a {path.stem} image"} for path in sorted(images.glob("*.png"))]
    write_lines(images / "metadata.jsonl", rows)
    source = {"format": "captions", "file": str(images)}
    path = config(tmp_path, tiny_vlm("llava"), task="caption", train=source, valid=dict(source))
    assert main(["train", path]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"caption", "caption_loss"} <= summary.keys()

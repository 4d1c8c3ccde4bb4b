"""A mixture as people have it: five files of five shapes, one of them text alone, a damaged image, rows too long."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dora_mm.cli import main
from tests.shared.data.chats import items, messages, said
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images
from tests.shared.killed import assert_same_weights, kill_after

STEPS = 12


@pytest.fixture
def config(tiny_vlm, tmp_path):
    """Writes the files and a config of a run named `name`; returns its path."""
    loaded_images = tmp_path / "pictures"
    loaded_images.mkdir()
    write_images(loaded_images)
    whole = (loaded_images / "wide.png").read_bytes()
    (loaded_images / "damaged.png").write_bytes(whole[:-40])
    names = ["wide.png", "tall.png", "square.png"]
    llava = [{"image": name, "conversations": said("<image>\nWhat?", "x", "Why?")} for name in [*names, "damaged.png"]]
    factory = [{"images": [name], "messages": messages("<image>Where?", "here")} for name in names]
    hugging = [{"image": "square.png", "messages": messages(items({}, "long " * 90), "lost")}]
    hugging += [{"image": name, "messages": messages(items({}, "Who?"), f"a {name}")} for name in names]
    vision = [{"images": [{"bytes": whole, "path": None}], "texts": [{"user": "How?", "assistant": "so"}]}] * 2
    text = [{"instruction": f"Add {n}.", "input": "", "output": str(n + 1)} for n in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in factory)
    (tmp_path / "factory.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(vision), tmp_path / "vision.parquet")
    images = {"format": "chat", "images": str(loaded_images)}
    sources = [
        images | {"file": str(write_json(tmp_path / "llava.json", llava))},
        images | {"file": str(tmp_path / "factory*.gz"), "weight": 2.0},
        images | {"file": str(write_json(tmp_path / "hugging.json", hugging))},
        {"format": "chat", "file": str(tmp_path / "vision.parquet")},
        {"format": "chat", "file": str(write_json(tmp_path / "text.json", text)), "weight": 0.5},
    ]

    def write(name: str):
        values = {
            "pipeline": "train_vl",
            "model": {"path": str(tiny_vlm("llava")), "max_length": 60},
            "adapter": {"rank": 2},
            "data": {
                "train": sources[0],
                "more": sources[1:],
                "on_bad_data": "skip",
                "group_by_length": True,
                "tables": str(tmp_path / "tables"),
            },
            "optimizer": {"lr": 0.02},
            "train": {"steps": STEPS, "batch_size": 3, "checkpoint_every": 1, "log_every": 1},
            "output": str(tmp_path / name),
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def test_it_trains_and_counts_what_it_leaves_out(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dora_mm.preview.lengths.SAMPLE", 1)
    assert main(["train", str(config("run")), "--set", "train.steps=9"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows_left_out"] >= 2  # 27 rows in 9 steps, an epoch and more
    assert "damaged.png is not a complete image" in caplog.text
    assert "its whole answer is beyond 60 tokens (model.max_length)" in caplog.text


@pytest.mark.slow
def test_it_is_killed_twice_and_ends_with_the_same_bits(config, tmp_path):
    assert main(["train", str(config("whole"))]) == 0
    killed = tmp_path / "killed"
    kill_after("step-000003", config("killed"), killed)
    kill_after("step-000007", None, killed)
    assert not (killed / "summary.json").exists()
    assert main(["train", "--resume", str(killed)]) == 0
    assert_same_weights(f"step-{STEPS:06d}", tmp_path / "whole", killed)
    counts = [json.loads((run / "summary.json").read_text())["rows_left_out"] for run in (tmp_path / "whole", killed)]
    assert counts[0] == counts[1] > 2

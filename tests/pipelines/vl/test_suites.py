"""Every suite from its official file to a table, with a tiny model."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.data.vl.readers import read_source
from dora_mm.data.vl.rows import BadRows
from tests.shared.data import hub_layouts, suite_files
from tests.shared.data import vl_files as files
from tests.shared.data.vlm_rows import save_noise


def config_of(suite: str, folder: Path, model: Path) -> Path:
    """An evaluation of a suite on its file, with the images that its rows name."""
    source = suite_files.source(suite, folder, **({"split": "test"} if suite == "scienceqa" else {}), limit=2)
    for number, row in enumerate(read_source(source, BadRows("stop"))):
        for name in (name for name in row.images if not name.startswith("data:")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_noise(folder / name, number, 40, 60)
    valid = {"format": source.format, "file": source.file, "limit": 2}  # MMMU's third row has no answer
    valid |= {"split": source.split} if source.split else {}
    valid |= {"images": str(folder)} if source.reader.images in ("named", "either") else {}
    config = {
        "pipeline": "eval_vl",
        "model": {"path": str(model)},
        "data": {"task": suite, "valid": valid, "tables": str(folder / "tables")},
        "decode": {"max_new_tokens": 3},
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suite", suite_files.MAKERS)
def test_a_suite_runs_from_its_official_file_to_a_table(suite, tiny_vlm, tmp_path, capsys):
    path = config_of(suite, tmp_path, tiny_vlm("llava"))
    assert main(["eval", str(path)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())[suite]
    assert scores["main"] in scores["rules"]
    assert "95 % interval" in printed
    assert main(["score", str(tmp_path / "run" / f"scored_{suite}.jsonl")]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in printed.splitlines() if line.startswith("|")
    ]
    assert main(["eval", str(path)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_suite_is_trained_on_and_scored(tiny_vlm, tmp_path, capsys):
    path = config_of("textvqa", tmp_path, tiny_vlm("llava"))
    config = yaml.safe_load(path.read_text())
    data = config["data"] | {"train": config["data"]["valid"]}
    train = {
        "pipeline": "train_vl",
        "model": config["model"],
        "adapter": {"rank": 2},
        "data": data,
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_size": 1},
        "evaluate": {"max_new_tokens": 2},
        "output": str(tmp_path / "trained"),
    }
    path.write_text(json.dumps(train))
    assert main(["train", str(path)]) == 0
    assert "textvqa" in json.loads((tmp_path / "trained" / "summary.json").read_text())


@pytest.mark.slow
def test_a_file_of_the_hub_is_previewed_trained_on_and_scored_without_a_folder_of_images(tiny_vlm, tmp_path, capsys):
    source = {"format": "docvqa", "file": str(hub_layouts.write(hub_layouts.DOCUMENTS, tmp_path))}
    config = {
        "pipeline": "train_vl",
        "model": {"path": str(tiny_vlm("llava"))},
        "adapter": {"rank": 2},
        "data": {"task": "docvqa", "train": source, "valid": source, "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_size": 1},
        "evaluate": {"max_new_tokens": 2},
        "output": str(tmp_path / "trained"),
    }
    path = files.write_json(tmp_path / "config.yaml", config)
    assert main(["train", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"learned of several answers \(all are scored\) +the first of 1 rows", printed)
    assert main(["train", str(path)]) == 0
    assert "docvqa" in json.loads((tmp_path / "trained" / "summary.json").read_text())


@pytest.mark.slow
def test_a_suite_of_a_file_is_evaluated_by_its_path(tiny_vlm, tmp_path):
    path = config_of("docvqa", tmp_path, tiny_vlm("llava"))
    suite = tmp_path / "mine.yaml"
    suite.write_text('title: mine\nreaders: [docvqa]\nmetric: exact\nprompt: "{text}"\n')
    assert main(["eval", str(path), "--set", f"data.task={suite}"]) == 0
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"scored_mine.jsonl", "predictions_mine.jsonl"} <= files
    suite.write_text(suite.read_text().replace("{text}", "{text} Now."))
    assert main(["eval", str(path), "--set", f"data.task={suite}"]) == 2  # another suite now: not the same evaluation

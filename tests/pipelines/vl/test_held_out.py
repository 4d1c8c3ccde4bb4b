"""Trainings whose validation split is a share of the training split, on a tiny model through the command line."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dora_mm.cli import main
from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.splits import open_training
from dora_mm.preview.vl_data import AllRows
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory
from tests.shared.data.vlm_rows import save_noise
from tests.shared.killed import assert_same_weights

NUM_IMAGES = 10  # with two rows each


@pytest.fixture
def config(tmp_path, tiny_vlm) -> str:
    rows = []
    for number in range(NUM_IMAGES):
        save_noise(tmp_path / f"{number}.png", number, 40, 60)
        for question in ("What is it?", "Which colour has it?"):
            said = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": f"noise {number}"}]
            rows.append({"id": len(rows), "image": f"{number}.png", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = {"format": "chat", "file": str(tmp_path / "rows.json"), "images": str(tmp_path)}
    values = {
        "pipeline": "train_vl",
        "model": {"path": str(tiny_vlm("llava"))},
        "adapter": {"rank": 2},
        "data": {"train": source, "valid": {"share": 0.3, "limit": 5}, "tables": str(tmp_path / "tables")},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "log_every": 1},
        "evaluate": {"max_new_tokens": 2},
        "output": str(tmp_path / "run"),
    }
    return write(tmp_path / "config.yaml", values)


def write(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_training_and_an_evaluation_score_the_rows_that_are_held_out(config, tmp_path, capsys, caplog):
    assert main(["train", config, "--dry-run"]) == 0
    assert re.search(r"\nrows +16 +4\n", capsys.readouterr().out)  # two images: a third has more rows than the limit
    assert main(["train", config]) == 0
    assert caplog.text.count("rows.json: 4 of 20 rows are held out for validation") == 1
    assert "chat: 16 rows; tokens" in caplog.text
    run = tmp_path / "run"
    assert "chat" in json.loads((run / "summary.json").read_text())

    values = yaml.safe_load(Path(config).read_text())
    evaluation = {key: values[key] for key in ("model", "data")}
    evaluation |= {"pipeline": "eval_vl", "adapter": str(run), "decode": {"max_new_tokens": 2}, "examples": 0}
    evaluation["output"] = str(tmp_path / "scores")
    assert main(["eval", write(tmp_path / "eval.yaml", evaluation)]) == 0
    answers = (tmp_path / "scores" / "predictions_chat.jsonl").read_text().splitlines()
    ids = [int(json.loads(line)["id"]) for line in answers]
    assert len(ids) == 4
    assert all(row ^ 1 in ids for row in ids)  # both rows of an image
    assert "trained on" not in caplog.text + (tmp_path / "scores" / "report.md").read_text()
    larger = ["--set", "data.valid={share: 0.6}", f"output={tmp_path / 'larger'}"]
    assert main(["eval", str(tmp_path / "eval.yaml"), *larger]) == 0
    assert f"8 of 12 rows were trained on by {run}" in caplog.text
    assert "8 of 12 rows were trained on by" in (tmp_path / "larger" / "report.md").read_text()
    data = VLDataConfig.model_validate(values["data"])
    trained = open_training(data, 2, AllRows())["chat"].table
    assert {int(row.id) for row in trained} == set(range(20)) - set(ids)


@pytest.mark.slow
def test_the_loss_of_each_held_out_row_is_kept_and_comes_again_in_the_same_bytes(config, tmp_path, capsys):
    values = yaml.safe_load(Path(config).read_text())
    values["evaluate"] |= {"per_example_every": 1, "base": False}
    path = write(tmp_path / "each.yaml", values)
    assert main(["train", path, "--dry-run"]) == 0
    assert "each      the loss of each validation row in a pass of its own, at the start" in capsys.readouterr().out
    assert main(["train", path]) == 0
    assert "0 of 4 rows have losses that stay apart" in capsys.readouterr().out
    files = sorted((tmp_path / "run" / "losses").iterdir())
    assert [file.name for file in files] == [f"step-00000{step}.jsonl" for step in (0, 1, 2)]
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    assert [(row["group"], row["text"]) for row in rows] == [
        ("chat", "What is it?"),
        ("chat", "Which colour has it?"),
    ] * 2
    assert all(row["answer"].startswith("noise ") and Path(row["path"]).is_file() for row in rows)
    (last,) = (json.loads(line) for line in (tmp_path / "run/validation/metrics.jsonl").read_text().splitlines()[-1:])
    mean = sum(row["losses"][0] for row in rows) / 4  # the answers have equally many tokens
    assert mean == pytest.approx(last["chat/loss"], rel=1e-4)
    assert main(["train", path, "--set", "train.steps=1", f"output={tmp_path / 'half'}"]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", "train.steps=2"]) == 0
    assert (tmp_path / "half" / "losses" / files[-1].name).read_bytes() == files[-1].read_bytes()
    del values["data"]["valid"]
    assert main(["train", write(tmp_path / "none.yaml", values)]) == 2
    assert "evaluate.per_example_every has no effect: no task has a valid split" in capsys.readouterr().err


def test_a_resumed_run_has_the_same_split_and_notices_another_one(config, tmp_path, capsys):
    assert main(["train", config]) == 0
    one = ["train", config, "--set", "train.steps=1", f"output={tmp_path / 'short'}"]
    assert main(one) == 0
    assert main(["train", "--resume", str(tmp_path / "short"), "--set", "train.steps=2"]) == 0
    assert_same_weights("step-000002", tmp_path / "run", tmp_path / "short")
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert {"base_digest", "the data of chat", "files of the model"} <= set(inputs)
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=3", "data.valid.share=0.1"]) == 2
    assert "data.valid.share cannot change from 0.3 to 0.1" in capsys.readouterr().err
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[::-1]))
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=3"]) == 2
    assert "the data of chat" in capsys.readouterr().err


def test_answers_are_written_when_a_person_asks_for_them(config, tmp_path, monkeypatch):
    answering = RunDirectory.answering

    def asked(run, request):
        if request == SAMPLE_NOW and not run.samples.exists():
            (run.path / SAMPLE_NOW).touch()
        return answering(run, request)

    monkeypatch.setattr(RunDirectory, "answering", asked)
    assert main(["train", config]) == 0
    (file,) = (tmp_path / "run" / "samples").iterdir()
    assert file.name == "step-000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"chat"}
    assert all(row["question"] and row["references"] and isinstance(row["answer"], str) for row in rows)
    assert not (tmp_path / "run" / SAMPLE_NOW).exists()


def test_a_share_that_the_groups_of_rows_miss_is_reported(config, tmp_path, caplog, capsys):
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = [{**row, "image": f"{min(number // 6, 3)}.png"} for number, row in enumerate(rows)]  # 6, 6, 6 and 2 rows
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["train", config, "--dry-run", "--set", "data.valid={share: 0.25}"]) == 0
    message = "2 of 20 rows are held out, not 5 as data.valid.share 0.25 asks for"
    assert message in capsys.readouterr().out
    assert "asks for" not in capsys.readouterr().out
    assert main(["train", config, "--set", "data.valid={share: 0.25}", "train.steps=1"]) == 0
    assert caplog.text.count(message) == 1


def test_rows_about_a_single_image_are_told_in_a_sentence(config, tmp_path, capsys):
    rows = json.loads((tmp_path / "rows.json").read_text())[:2]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for arguments in (["train", config], ["train", config, "--dry-run"]):
        assert main(arguments) == 2
        text, error = capsys.readouterr()
        assert "rows.json: no rows can be held out (data.valid.share)" in error
    assert re.search(r"time +not measured: .*no rows can be held out", text)
    assert main(["train", config, "--set", "data.valid=null"]) == 0


def test_a_training_reports_the_base_the_adapter_and_how_few_rows_there_are(config, tmp_path, capsys, caplog):
    assert main(["train", config, "--set", "evaluate.every=1", "data.task=chat_sentences"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"- ROUGE-L [\d.]+: no 95 % interval, .*; n = 4 in 2 groups", printed)
    found = re.search(r"of the base ([\d.]+), with the adapter ([\d.]+): (\S+) points; no 95 % interval", printed)
    before, after, gain = map(float, found.groups())
    assert gain == pytest.approx(after - before, abs=0.11)
    assert re.search(r"step 1: chat_sentences [\d.]+ \(n = 4: too few to judge by\)", caplog.text)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["chat_sentences_base"] == pytest.approx(before, abs=0.06)


def test_the_base_need_not_be_scored(config, tmp_path, capsys):
    assert main(["train", config, "--set", "evaluate.base=false", "train.steps=1"]) == 0
    assert "of the base" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "base_scores.json").exists()

"""The video tasks from VALUE's files to the predictions of a test split, and the configs of the test splits."""

import json

import numpy as np
import pytest
import torch
import yaml

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from tests.shared.data.vl_files import write_lines
from tests.shared.vl.small_vl_bart import DIM, small_bart, small_tokenizer

CLIPS = ("clip0", "clip1", "clip2")


@pytest.fixture
def section(tmp_path):
    """The sections that a training and an evaluation share."""
    features = tmp_path / "features"
    features.mkdir()
    for seed, clip in enumerate(CLIPS):
        frames = np.random.default_rng(seed).normal(size=(5, DIM)).astype(np.float16)
        np.savez(features / f"{clip}.npz", features=frames)
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "video"), small_tokenizer(), tmp_path / "model")
    return {
        "model": {"family": "vl_bart", "path": str(tmp_path / "model")},
        "vision": {"features": [str(features)]},
    }


def question(number: int, **changes) -> dict:
    choices = {f"a{index}": word for index, word in enumerate(["a red cat", "two dogs", "a bus", "no"])}
    row = {"qid": number, "q": "what is there?", "ts": "1-2", "vid_name": CLIPS[number % 3], **choices}
    return {**row, "answer_idx": number % 4, **changes}


def clip(number: int, descriptions: int) -> dict:
    row = {"clip_id": number, "vid_name": CLIPS[number], "ts": "1-2"}
    words = ("a red cat", "two dogs and a red cat left of the bus", "yes")
    return row | ({"descs": [{"desc": word} for word in words[:descriptions]]} if descriptions else {})


def sources(folder, split: str, rows: dict) -> dict[str, dict]:
    """The source of each task's rows; no file of subtitles has the last clip."""
    subtitles = [{"vid_name": name, "sub": [{"text": "is there?"}]} for name in CLIPS[:2]]
    shared = {"subtitles": str(write_lines(folder / "subtitles.jsonl", subtitles))}
    forms = {"how2qa": "video_qa", "tvc": "video_captions"}
    return {
        task: {"format": forms[task], "file": str(write_lines(folder / f"{task}_{split}.jsonl", found)), **shared}
        for task, found in rows.items()
    }


def test_a_run_learns_every_description_and_answers_a_test_split(tmp_path, section, capsys):
    tables = {"tables": str(tmp_path / "tables")}
    labelled = {"how2qa": [question(n) for n in range(4)], "tvc": [clip(0, 2), clip(1, 3), clip(2, 1)]}
    train, valid = (sources(tmp_path, split, labelled) for split in ("train", "valid"))
    tasks = [{"task": task, "train": train[task], "valid": valid[task]} for task in labelled]
    config = {
        **section,
        "pipeline": "train_vl",
        "adapter": {"rank": 2, "norm_grad": "exact", "extra_trainable": ["visual_embedding", "biases"]},
        "data": {"tasks": tasks, **tables},
        "optimizer": {"lr": 0.01},
        "train": {"epochs": 1, "batch_size": 2, "log_every": 1},
        "evaluate": {"beams": 2},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4 // 2 + 6 // 2

    hidden = {
        "how2qa": [{k: v for k, v in question(n).items() if k != "answer_idx"} for n in range(4)],
        "tvc": [clip(n, 0) for n in range(3)],
    }
    test = sources(tmp_path, "test", hidden)
    config = {
        **section,
        "pipeline": "eval_vl",
        "adapter": str(tmp_path / "run"),
        "data": {"tasks": [{"task": task, "valid": test[task]} for task in hidden], **tables},
        "decode": {"beams": 2},
        "output": str(tmp_path / "eval"),
    }
    path.write_text(yaml.safe_dump(config))
    assert main(["eval", str(path)]) == 0
    assert "No answers to compare with: predictions only." in (tmp_path / "eval" / "report.md").read_text()
    assert set(json.loads((tmp_path / "eval" / "predictions_how2qa.json").read_text())) == {"0", "1", "2", "3"}
    rows = [json.loads(line) for line in (tmp_path / "eval" / "predictions_tvc.jsonl").read_text().splitlines()]
    assert [(row["vid_name"], row["clip_id"], len(row["descs"])) for row in rows] == [
        (name, number, 1) for number, name in enumerate(CLIPS)
    ]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_test_splits_are_scored_with_the_model_that_was_trained(kind):
    trained, scored = (load_config(f"configs/vl_bart/{name}.yaml") for name in (f"{kind}_dora", f"eval_{kind}_test"))
    assert (scored.model, scored.vision) == (trained.model, trained.vision)
    assert [task.task for task in scored.data.tasks] == [task.task for task in trained.data.tasks]
    used = {(source.file, source.split) for task in trained.data.tasks for source in (task.train, task.valid)}
    shared = {(task.valid.file, task.valid.split) for task in scored.data.tasks} & used
    assert shared <= {("data/gqa/testdev_balanced_questions.json", None)}  # also the paper's validation


@pytest.mark.parametrize("name", ["image_dora", "video_dora"])
def test_the_papers_runs_have_the_authors_norm_gradient(name):
    assert load_config(f"configs/vl_bart/{name}.yaml").adapter.norm_grad == "exact"

"""Whole trainings with `train.compile`: the same losses and files as without, and they resume.

Those that compile take minutes, and are slow tests; tests/adapting/test_compiled.py has the formulas.
"""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dora_mm.adapting import compiled
from dora_mm.cli import main
from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.train.checkpoint import checkpoints
from dora_mm.train.metrics import read_metrics
from tests.shared.data.vl_samples import captions
from tests.shared.data.vlm_rows import write_conversations, write_images
from tests.shared.vl.small_towers import DIM
from tests.shared.vl.small_vl_bart import small_bart, small_tokenizer

STEPS = 4
TRAIN = {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 9, "log_every": 1}


@pytest.fixture
def images_config(tmp_path, tiny_folder, image_folder):
    """SDXL on images of two shapes, with held-out ones and sheets."""
    return {
        "pipeline": "train_diffusion",
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "parts": ["unet.cross"]},
        "data": {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK", "valid": {"share": 0.2}},
        "train": {**TRAIN, "gradient_checkpointing": True},
        "evaluate": {"every": 2},
        "sample": {"prompts": ["a TOK icon"], "steps": 2},
    }


@pytest.fixture
def chat_config(tmp_path, tiny_vlm):
    """LLaVA on conversations, of which some have no image."""
    return {
        "pipeline": "train_vl",
        "model": {"path": str(tiny_vlm("llava")), "max_length": 64},
        "adapter": {"rank": 2, "parts": ["text.mlp"]},
        "data": {**write_conversations(tmp_path, write_images(tmp_path))},
        "train": TRAIN,
        "evaluate": {"every": 2, "max_new_tokens": 3},
    }


@pytest.fixture
def bart_config(tmp_path, vision):
    """VL-BART with dropout on captions."""
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), DIM, "image"), small_tokenizer(), tmp_path / "bart")
    task = {"task": "caption", "batch_size": 2, "train": captions("train", 8), "valid": captions("val", 4)}
    return {
        "pipeline": "train_vl",
        "model": {"family": "vl_bart", "path": str(tmp_path / "bart")},
        "vision": vision,
        "adapter": {"rank": 2, "extra_trainable": ["norms"]},
        "data": {"tasks": [task]},
        "train": {**TRAIN, "gradient_accumulation_steps": 2},
    }


BLOCKS = {"images": "BasicTransformerBlock of unet", "chat": "LlamaDecoderLayer of model", "bart": "BartEncoderLayer"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_is_as_without_and_resumes(name, request, tmp_path):
    torch._dynamo.reset()
    values = request.getfixturevalue(f"{name}_config")
    runs = {}
    for run in ("plain", "compiled"):
        runs[run] = tmp_path / run
        more = {"compile": run == "compiled"}
        config = {**values, "optimizer": {"lr": 0.01}, "output": str(runs[run]), "train": {**values["train"], **more}}
        if name != "images":
            config["data"] = {**values["data"], "tables": str(tmp_path / "tables")}
        (tmp_path / f"{run}.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(tmp_path / f"{run}.yaml")]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    rows = [read_metrics(run / "metrics.jsonl") for run in runs.values()]
    for key in ("last_loss", "grad_norm"):  # Adam makes whole steps of what rounding leaves in gradients near 0
        compiled_values, values = ([row[key] for row in found] for found in reversed(rows))
        assert compiled_values[0] == pytest.approx(values[0], rel=1e-5)
        assert compiled_values == pytest.approx(values, rel=1e-2)
    weights = [load_file(run / "checkpoints/step-000004/trained_weights.safetensors") for run in runs.values()]
    assert weights[0].keys() == weights[1].keys()
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs.values()]
    assert [name for name in files[0] if "tfevents" not in name] == [
        name for name in files[1] if "tfevents" not in name
    ]

    resumed = shutil.copytree(runs["compiled"], tmp_path / "resumed")
    shutil.rmtree(checkpoints(resumed / "checkpoints")[-1])
    (resumed / "summary.json").unlink()
    assert main(["train", "--resume", str(resumed)]) == 0
    if name == "chat":  # rows of several lengths: what is compiled for which of them depends on the first ones
        losses = [row["last_loss"] for row in read_metrics(resumed / "metrics.jsonl")]
        assert losses == pytest.approx([row["last_loss"] for row in rows[1]], rel=1e-2)
    else:
        again = load_file(resumed / "checkpoints/step-000004/trained_weights.safetensors")
        assert [key for key in again if not torch.equal(again[key], weights[1][key])] == []


@pytest.mark.parametrize("name", ["images", "chat"])
def test_a_dry_run_says_what_is_compiled_and_a_training_keeps_all_names(name, request, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "COMPILER", {"disable": True})  # a wrapper without anything inside
    values = request.getfixturevalue(f"{name}_config")
    train = {**values["train"], "steps": 2, "compile": True}
    config = {**values, "optimizer": {"lr": 0.01}, "output": str(tmp_path / "run"), "train": train}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert BLOCKS[name] in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled  "))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    names = load_file(tmp_path / "run/checkpoints/step-000002/trained_weights.safetensors").keys()
    assert not [name for name in names if "_orig_mod" in name or not name.startswith(("unet.", "model."))]


def test_without_a_compiler_nothing_is_written(chat_config, tmp_path, monkeypatch, capsys):
    def missing(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled, "COMPILER", {"backend": missing})
    config = {**chat_config, "optimizer": {"lr": 0.01}, "output": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--set", "train.compile=true"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("dora-mm: train.compile: torch.compile does not work here")
    assert "No working C++ compiler found" in error
    assert not (tmp_path / "run").exists()

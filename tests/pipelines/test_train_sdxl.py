"""From a folder of pictures to an adapter that plain diffusers loads, and back from every interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.sampling.sdxl import sample
from dora_mm.train.checkpoint import checkpoints

PROMPT = "a TOK icon of a bus"


@pytest.fixture
def config(tmp_path, tiny_folder, picture_folder):
    """A short training as a file; call with keys to change."""

    def write(name="short", **changes):
        values = {
            "pipeline": "train_sdxl",
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_folder)},
            "adapter": {"rank": 4, "parts": ["attn", "cross", "ff", "conv"]},
            "data": {"folder": str(picture_folder), "resolution": 64, "placeholder": "TOK", "caption_dropout": 0.2},
            "optimizer": {"lr": 0.01},
            "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 9, "log_every": 1},
            "sample": {"prompts": [PROMPT], "steps": 2},
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            if leaf:
                values[section][leaf] = value
            else:
                values[section] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def largest_difference(one, two):
    return np.abs(np.asarray(one, dtype=np.float64) - np.asarray(two, dtype=np.float64)).max() / 255


ADAPTERS = {
    "dora": {},
    "alpha": {"adapter__alpha": 10.0},
    "lora": {"adapter__method": "lora"},
    "magnitude": {"adapter__method": "magnitude"},
    "text encoders": {"adapter__text_encoders": True, "adapter__alpha": 2.0},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_plain_diffusers_draws_our_picture(config, tmp_path, tiny_folder, kind):
    assert main(["train", str(config(**ADAPTERS[kind]))]) == 0
    run = tmp_path / "run"
    prompts = tmp_path / "sample.yaml"
    prompts.write_text(
        yaml.safe_dump(
            {
                "pipeline": "sample_sdxl",
                "output": str(tmp_path / "drawn"),
                "model": {"path": str(tiny_folder)},
                "adapter": {"path": str(run / "adapter")},
                "prompts": [PROMPT],
                "seeds": [7],
                "steps": 3,
            },
            sort_keys=False,
        )
    )
    assert main(["sample", str(prompts)]) == 0
    ours = Image.open(tmp_path / "drawn" / "samples" / "strength-1" / "000-seed7.png")
    bare = Image.open(tmp_path / "drawn" / "samples" / "no-adapter" / "000-seed7.png")
    assert json.loads(ours.text["dora_mm"])["prompt"] == PROMPT

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    assert largest_difference(bare, sample(pipe, [PROMPT], [7], steps=3)[0]) == 0
    pipe.load_lora_weights(str(run / "adapter"))
    theirs = sample(pipe, [PROMPT], [7], steps=3)[0]
    assert largest_difference(ours, theirs) <= 1.5 / 255  # 8-bit pictures; the float comparison is in tests/io
    assert largest_difference(ours, bare) > 3 / 255


def test_a_run_holds_what_made_it(config, tmp_path, capsys):
    assert main(["train", str(config(sample__every=2))]) == 0
    run = tmp_path / "run"
    assert load_config(run / "config.yaml").train.steps == 4
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert list((run / "tensorboard").iterdir())
    assert Image.open(run / "sheet.png").width > 200
    assert (run / "samples" / "step-000002.png").is_file()
    assert str(run / "sheet.png") in capsys.readouterr().out


def test_adapters_stay_float32_over_a_bf16_model(config, tmp_path):
    assert main(["train", str(config(model__dtype="bfloat16", train__mixed_precision="bf16"))]) == 0
    for folder in checkpoints(tmp_path / "run" / "checkpoints"):
        assert {t.dtype for t in load_file(folder / "weights.safetensors").values()} == {torch.float32}
    tensors = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_full_training_saves_whole_weights(config, tmp_path):
    assert main(["train", str(config(adapter__method="full"))]) == 0
    assert (tmp_path / "run" / "adapter" / "trained_weights.safetensors").is_file()


def test_gradient_checkpointing_and_accumulation_change_nothing(config, tmp_path):
    weights = []
    for name, changes in {"plain": {}, "checkpointed": {"train__gradient_checkpointing": True}}.items():
        path = config(name, output=str(tmp_path / name), train__accumulation=2, sample__prompts=[], **changes)
        assert main(["train", str(path)]) == 0
        weights.append(load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors"))
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, kill):
    """A real process, really killed: weights, optimiser and data order go on as if nothing had happened."""
    settings = {"train__steps": 30, "train__checkpoint_every": 3, "train__keep_checkpoints": 99, "sample__prompts": []}
    assert main(["train", str(config("whole", output=str(tmp_path / "whole"), **settings))]) == 0
    run = tmp_path / "parts"
    path = config("parts", output=str(run), **settings)
    command = [sys.executable, "-m", "dora_mm", "train", str(path)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    deadline = time.monotonic() + 120
    while len(checkpoints(run / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(kill)
    assert process.wait(60) == (143 if kill == signal.SIGTERM else -signal.SIGKILL)
    stopped_at = json.loads((checkpoints(run / "checkpoints")[-1] / "checkpoint.json").read_text())["step"]
    assert 6 <= stopped_at < 30
    assert main(["train", "--resume", str(run)]) == 0
    for part in ("weights.safetensors",):
        one, two = (load_file(r / "checkpoints" / "step-000030" / part) for r in (tmp_path / "whole", run))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    states = [
        torch.load(r / "checkpoints" / "step-000030" / "state.pt", weights_only=True) for r in (tmp_path / "whole", run)
    ]
    one, two = (state["optimizer"]["state"] for state in states)
    assert all(torch.equal(one[i][key], two[i][key]) for i in one for key in one[i])


BAD = {
    "no caption holds the placeholder": ({"data__placeholder": "SKS"}, "SKS"),
    "the run exists": ({"output": "."}, "exists"),
    "an adapter for another model": ({"adapter__init_from": "nowhere.safetensors"}, "nowhere.safetensors"),
    "no such model": ({"model__path": "./nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(config, tmp_path, name, capsys, monkeypatch):
    changes, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    path = config(**changes)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dora-mm: ")
    assert said in error
    assert sorted(tmp_path.rglob("*")) == sorted({*before, Path(path)})


def test_prompt_files(tmp_path):
    from pipelines.sample_sdxl import read_prompts

    (tmp_path / "a.txt").write_text("a bus\n\n  a cat \n")
    (tmp_path / "a.csv").write_text('prompt,other\n"a bus, red",1\na cat,2\n')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a bus"}\n\n{"prompt": "a cat"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["a bus", "a cat"]
    assert read_prompts(tmp_path / "a.csv") == ["a bus, red", "a cat"]
    assert read_prompts(tmp_path / "a.jsonl") == ["a bus", "a cat"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a bus"}\n{"promt": "a cat"}\n')
    with pytest.raises(ValueError, match="line 2 has no prompt"):
        read_prompts(tmp_path / "b.jsonl")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "b.txt")

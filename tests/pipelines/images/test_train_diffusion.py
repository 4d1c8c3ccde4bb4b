"""From a folder of images to an adapter that plain diffusers loads, and resuming after every interruption."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_mm.adapting import compiled
from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.models.images import families
from dora_mm.preview.image_page import size_of_sheets
from dora_mm.recipes import PIPELINES
from dora_mm.sampling.gallery import folder as gallery_folder
from dora_mm.sampling.manifest import read_manifest
from dora_mm.train.checkpoint import checkpoints, last_step
from dora_mm.train.metrics import read_metrics
from dora_mm.train.state_file import read_state
from dora_mm.utils.lock import LOCK, only_writer
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory
from tests.pipelines.images.test_sample import make_adapter
from tests.shared.killed import files_in
from tests.shared.pages import data_of

PROMPT = "a TOK icon of a bus"
ADAPTER = "pytorch_lora_weights.safetensors"
UNET = ["unet.attn", "unet.cross", "unet.ff", "unet.conv"]


@pytest.fixture
def config(tmp_path, tiny_folder, image_folder):
    """Writes the config of a short training; keyword arguments change values (section__key=value)."""

    def write(name="short", **changes):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_folder)},
            "adapter": {"rank": 4, "parts": UNET},
            "data": {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK", "caption_dropout": 0.2},
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
    "strength": {"adapter__strength": 1.5},
    "text encoders": {"adapter__parts": [*UNET, "text_encoders.attn"], "adapter__alpha": 2.0},
    "parts": {
        "adapter__parts": {
            "unet.attn": {"rank": 2},
            "unet.conv": {"lr": 0.02},
            "text_encoder.attn": {"method": "lora", "rank": 1, "alpha": 3.0},
        }
    },
}
FAST = ("parts",)  # DoRA and LoRA, ranks, alpha, convolutions and text encoders


@pytest.mark.parametrize("kind", [*FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in ADAPTERS if k not in FAST)])
def test_plain_diffusers_draws_our_image(config, tmp_path, tiny_folder, kind):
    assert main(["train", str(config(**ADAPTERS[kind]))]) == 0
    run = tmp_path / "run"
    prompts = tmp_path / "sample.yaml"
    prompts.write_text(
        yaml.safe_dump(
            {
                "pipeline": "sample",
                "output": str(tmp_path / "drawn"),
                "model": {"path": str(tiny_folder)},
                "adapter": {"path": str(run / "adapter")},
                "prompts": [PROMPT],
                "seeds": [7],
                "steps": 3,
                "strengths": [0, 1],
            },
            sort_keys=False,
        )
    )
    assert main(["sample", str(prompts)]) == 0
    ours = Image.open(tmp_path / "drawn" / "samples" / "0001-seed7-strength1.png")
    bare = Image.open(tmp_path / "drawn" / "samples" / "0001-seed7-strength0.png")
    assert ours.text["parameters"].startswith(PROMPT)

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    # 8-bit images, from weights at other addresses: the products of some processors then differ in the last bit.
    # Floats are compared in tests/formats.
    same = 1.5 / 255

    def draw():
        generator = torch.Generator().manual_seed(7)
        return pipe(PROMPT, num_inference_steps=3, guidance_scale=5.0, generator=generator).images[0]

    assert largest_difference(bare, draw()) <= same
    pipe.load_lora_weights(str(run / "adapter"))
    theirs = draw()
    assert largest_difference(ours, theirs) <= same
    assert largest_difference(ours, bare) > 3 / 255


def test_the_sheet_shows_the_saved_strength(config, tmp_path, tiny_folder):
    """Compares the contact sheet of the run, from weights in memory, with one of the saved file at strength 1."""
    assert main(["train", str(config(adapter__strength=1.5, sample__before_after=False, train__steps=2))]) == 0
    file = config(
        "next", output=str(tmp_path / "next"), adapter__init_from=str(tmp_path / "run" / "adapter"), train__steps=1
    )
    assert main(["train", str(file), "--set", "optimizer.lr=1e-12", "sample.before_after=false"]) == 0
    sheets = [Image.open(tmp_path / run / "sheet.png") for run in ("run", "next")]
    assert largest_difference(*sheets) <= 2.5 / 255  # rounding, of several releases of torch


def test_a_run_directory_is_complete(config, tmp_path, capsys):
    assert main(["train", str(config(sample__every=3))]) == 0
    run = tmp_path / "run"
    assert load_config(run / "config.yaml").train.steps == 4
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert versions["adapted layers"] == "torch" or torch.cuda.is_available()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert list((run / "tensorboard").iterdir())
    assert Image.open(run / "sheet.png").width > 150  # the image, and the labels at its left
    sheets = [run / "samples" / f"step-00000{step}.png" for step in (0, 3)]
    assert sorted((run / "samples").glob("*.png")) == sheets
    entries = read_manifest(run)
    assert [entry.settings["step"] for entry in entries] == [None, 3, 4]  # the bare model, and the adapter so far
    assert all(Image.open(run / entry.file).size == (64, 64) for entry in entries)
    (about,) = data_of(run / "gallery" / "index.html")["trainings"]
    assert (about["finished"], about["checkpoints"], about["kept"]["4"]) == (True, [2, 4], str(run))
    printed = capsys.readouterr().out
    assert str(run / "sheet.png") in printed
    assert str(run / "gallery" / "index.html") in printed
    gpu = ModelCard.load(run / "adapter" / "README.md")
    (shown,) = gpu.data.widget
    assert shown["text"] == PROMPT
    assert Image.open(run / "adapter" / shown["output"]["url"]).size == (64, 64)
    assert "pipeline: train_diffusion" in gpu.text


@pytest.mark.slow
def test_a_sheet_is_drawn_when_a_person_asks_for_it(config, tmp_path, monkeypatch):
    """Between two steps, without an effect on the weights."""
    settings = {"sample__prompts": [], "train__steps": 3, "adapter__parts": ["unet.attn"]}
    assert main(["train", str(config("plain", output=str(tmp_path / "plain"), **settings))]) == 0
    recipe, answering = PIPELINES.load("train_diffusion"), RunDirectory.answering

    def asked(run, request):
        if request == SAMPLE_NOW and not (run.samples / "step-000001.png").exists():
            (run.path / SAMPLE_NOW).touch()
        return answering(run, request)

    monkeypatch.setattr(recipe.RunDirectory, "answering", asked)
    assert main(["train", str(config(**{**settings, "sample__prompts": [PROMPT]}))]) == 0
    run = tmp_path / "run"
    assert [path.name for path in (run / "samples").glob("*.png")] == ["step-000001.png"]
    assert not (run / SAMPLE_NOW).exists()
    one, two = (load_file(tmp_path / each / "adapter" / ADAPTER) for each in ("run", "plain"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_adapters_stay_float32_over_a_bf16_model(config, tmp_path):
    half = {"model__dtype": "bfloat16", "train__mixed_precision": "bf16"}
    assert main(["train", str(config(**half, train__steps=2, sample__prompts=[]))]) == 0
    for folder in checkpoints(tmp_path / "run" / "checkpoints"):
        assert {t.dtype for t in load_file(folder / "trained_weights.safetensors").values()} == {torch.float32}
    tensors = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_full_weights_are_saved_and_drawn(config, tmp_path, tiny_folder, capsys):
    assert main(["train", str(config(adapter__method="full", train__steps=1))]) == 0
    assert (tmp_path / "run" / "adapter" / "trained_weights.safetensors").is_file()
    drawing = tmp_path / "sample.yaml"
    values = {
        "pipeline": "sample",
        "output": str(tmp_path / "drawn"),
        "model": {"path": str(tiny_folder)},
        "adapter": {"path": str(tmp_path / "run" / "adapter")},
        "prompts": [PROMPT],
        "steps": 2,
    }
    drawing.write_text(yaml.safe_dump({**values, "strengths": [0.5, 1.0]}))
    assert main(["sample", str(drawing)]) == 2
    assert "cannot be generated at another strength than 1" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()
    drawing.write_text(yaml.safe_dump(values))
    assert main(["sample", str(drawing)]) == 0
    assert [path.name for path in (tmp_path / "drawn" / "samples").iterdir()] == ["0001-seed0.png"]


def test_an_initial_adapter_keeps_its_scaling(config, tmp_path, capsys):
    short = {"train__steps": 1, "sample__prompts": []}
    assert main(["train", str(config("first", output=str(tmp_path / "first"), adapter__alpha=2.0, **short))]) == 0
    adapter = str(tmp_path / "first" / "adapter")
    assert main(["train", str(config(adapter__init_from=adapter, adapter__alpha=2.0, **short))]) == 0
    second = {"output": str(tmp_path / "second"), "adapter__init_from": adapter}
    assert main(["train", str(config(**second, adapter__alpha=16.0))]) == 2
    assert "has alpha 2 at" in capsys.readouterr().err
    assert main(["train", str(config(**second, adapter__rank=2))]) == 2
    assert "the config trains dora of rank 2 there: --set adapter.rank=4 adapter.alpha=2" in capsys.readouterr().err
    assert main(["train", str(config(**second, adapter__rank=2, adapter__alpha=2.0, adapter__scaling="sqrt"))]) == 2
    assert "--set adapter.rank=4 adapter.alpha=2 adapter.scaling=rank" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_images_are_encoded_outside_autocast(config, tmp_path, monkeypatch):
    dtypes = set()
    encode = AutoencoderKL.encode

    def recorded(vae, pixels):
        found = encode(vae, pixels)
        dtypes.add(found.latent_dist.mean.dtype)
        return found

    monkeypatch.setattr(AutoencoderKL, "encode", recorded)
    few = {"train__steps": 1, "sample__prompts": []}
    assert main(["train", str(config(data__crop="random", train__mixed_precision="bf16", **few))]) == 0
    assert dtypes == {torch.float32}


def test_frozen_text_encoders_are_freed_before_the_denoiser_is_loaded(config, monkeypatch):
    loaded, alive = {}, []
    load = families.load_components

    def watched(kind, path, names, *settings):
        gc.collect()
        if "unet" in names:
            alive.extend(name for name, network in loaded.items() if network() is not None)
        parts = load(kind, path, names, *settings)
        loaded.update({name: weakref.ref(parts[name]) for name in names if name.startswith("text_encoder")})
        return parts

    monkeypatch.setattr(families, "load_components", watched)
    assert main(["train", str(config(adapter__parts=["unet.attn"], train__steps=1, sample__prompts=[]))]) == 0
    assert set(loaded) == {"text_encoder", "text_encoder_2"}
    assert alive == []


def test_long_captions_of_different_lengths_train(config, image_folder, tmp_path):
    """In one batch, with frozen and with trained text encoders; nothing is truncated, and nothing is warned of."""
    captions = image_folder / "metadata.jsonl"
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    rows[0]["text"] += ", a flying saucer" * 9
    captions.write_text("\n".join(json.dumps(row) for row in rows))
    for part in ("unet.attn", "text_encoders.attn"):
        run = tmp_path / f"run-{part}"
        path = config(output=str(run), adapter__parts=[part], data__repeats=3, sample__prompts=[], train__steps=2)
        assert main(["train", str(path)]) == 0
        assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    weights = []
    for name, changes in {"plain": {}, "checkpointed": {"train__gradient_checkpointing": True}}.items():
        short = {"train__steps": 2, "train__gradient_accumulation_steps": 2, "sample__prompts": []}
        path = config(name, output=str(tmp_path / name), **short, **changes)
        assert main(["train", str(path)]) == 0
        weights.append(load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors"))
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def killed(arguments, run, how):
    """Runs a training in a process, and kills it after its first checkpoint; returns the step of the last one."""
    before = len(checkpoints(run / "checkpoints"))
    command = [sys.executable, "-m", "dora_mm", "train", *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    deadline = time.monotonic() + 120
    while len(checkpoints(run / "checkpoints")) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(60) == (143 if how == signal.SIGTERM else -how)
    return json.loads((checkpoints(run / "checkpoints")[-1] / "checkpoint.json").read_text())["step"]


@pytest.mark.slow
@pytest.mark.parametrize("over_assistant", [False, True])
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, tiny_folder, over_assistant):
    """Real processes are killed, in both ways, and resumed: weights, optimiser and data order are as without that."""
    settings = {"train__steps": 10, "train__checkpoint_every": 2, "train__keep_checkpoints": 99, "sample__prompts": []}
    settings |= {"data__valid": {"share": 0.4}, "evaluate": {"every": 3}, "ema": {"decay": 0.9}}
    if over_assistant:
        make_adapter(tiny_folder, tmp_path / "assistant", seed=0)
        assistant = {"path": str(tmp_path / "assistant"), "strength": 0.7}
        settings |= {"adapter__assistant": assistant, "loss": {"guided_target": {"scale": 2.0}}}
    settings |= {"data__resolution": None, "data__resolutions": [32, 64]}
    assert main(["train", str(config("uninterrupted", output=str(tmp_path / "uninterrupted"), **settings))]) == 0
    run = tmp_path / "interrupted"
    path = config("interrupted", output=str(run), **settings)
    first = killed([path], run, signal.SIGTERM)
    second = killed(["--resume", run], run, signal.SIGKILL)
    assert 2 <= first < second < 10
    assert main(["train", "--resume", str(run)]) == 0
    for name in ("trained_weights.safetensors",):
        one, two = (load_file(r / "checkpoints" / "step-000010" / name) for r in (tmp_path / "uninterrupted", run))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    states = [
        read_state(r / "checkpoints" / "step-000010" / "state.safetensors") for r in (tmp_path / "uninterrupted", run)
    ]
    one, two = (state["ema"] for state in states)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (state["optimizer"]["state"] for state in states)
    assert all(torch.equal(one[i][key], two[i][key]) for i in one for key in one[i])
    one, two = (read_metrics(r / "validation" / "metrics.jsonl") for r in (tmp_path / "uninterrupted", run))
    assert [row["step"] for row in one] == [0, 3, 6, 9, 10]
    assert one == two
    one, two = (read_metrics(r / "metrics.jsonl") for r in (tmp_path / "uninterrupted", run))
    assert [row["seconds"] for row in two] == sorted(row["seconds"] for row in two)
    for row in (*one, *two):
        del row["seconds"]
    assert one == two


@pytest.mark.slow
def test_held_out_losses_are_in_the_curves_and_change_no_bit(config, tmp_path, image_folder, capsys):
    """Those of step 0 are the base model's, and a fresh adapter is one."""
    parts = ["unet.attn", "text_encoder.attn"]
    shared = {"adapter__parts": parts, "sample__prompts": [], "train__steps": 2}
    assert main(["train", str(config(**shared))]) == 0
    held = tmp_path / "held"
    held.mkdir()
    for index in (0, 3):
        Image.open(image_folder / f"{index}.png").rotate(180).save(held / f"{index}.png")
        (held / f"{index}.txt").write_text("a TOK icon")
    valid = {"data__valid": {"folder": str(held)}, "evaluate": {"every": 1}, "output": str(tmp_path / "valid")}
    valid |= {"ema": {"decay": 0.5}, "sample__prompts": [PROMPT]}
    path = config("valid", **{**shared, **valid})
    assert main(["train", str(path)]) == 0
    plain, with_valid = (
        load_file(tmp_path / n / "checkpoints/step-000002/trained_weights.safetensors") for n in ("run", "valid")
    )
    assert all(torch.equal(plain[name], with_valid[name]) for name in plain)
    base, first, last = read_metrics(tmp_path / "valid" / "validation" / "metrics.jsonl")
    assert base.keys() == {"step", "held_out_loss", "trained_loss"}
    for row in (first, last):
        for name in ("held_out_loss", "trained_loss"):
            assert row[f"{name}_minus_base"] == row[name] - base[name] != 0
            assert row[f"ema/{name}"] not in (row[name], base[name])
    summary = json.loads((tmp_path / "valid" / "summary.json").read_text())
    assert summary["held_out_loss"] == pytest.approx(last["held_out_loss"], abs=1e-5)
    best = min((first, last), key=lambda row: row["held_out_loss"])
    assert summary["best_step"] == best["step"]
    assert (tmp_path / "valid" / "best" / "overall" / ADAPTER).is_file()
    average, last_one = (load_file(tmp_path / "valid" / name / ADAPTER) for name in ("adapter-ema", "adapter"))
    assert average.keys() == last_one.keys()
    assert not all(torch.equal(average[name], last_one[name]) for name in average)
    assert Image.open(tmp_path / "valid" / "sheet.png").height > 3 * 64  # before, after, average
    assert not (tmp_path / "valid" / "sheet-ema.png").exists()
    images = [(tmp_path / "valid" / name / "pictures/1.png").read_bytes() for name in ("adapter", "adapter-ema")]
    assert images[0] != images[1]
    capsys.readouterr()
    assert main(["train", str(path), "--set", f"output={tmp_path / 'new'}", "--dry-run"]) == 0
    assert "held out  2 (0.png, 3.png), their loss after every step" in capsys.readouterr().out


@pytest.mark.slow
def test_the_loss_of_each_image_is_on_the_page_and_comes_again_in_the_same_bytes(config, tmp_path, capsys):
    settings = {"data__resolution": None, "data__resolutions": [32, 64], "sample__prompts": []}
    settings |= {"evaluate": {"per_example_every": 2}}
    path = str(config("each", **settings))
    assert main(["train", path, "--dry-run"]) == 0
    assert "each      the loss of each of 5: 80 forward passes, 3 times in the training" in capsys.readouterr().out
    assert main(["train", path]) == 0
    files = sorted((tmp_path / "run" / "losses").iterdir())
    assert [file.name for file in files] == [f"step-00000{step}.jsonl" for step in (0, 2, 4)]
    losses = data_of(tmp_path / "run" / "gallery" / "index.html")["trainings"][0]["losses"]
    assert (losses["count"], losses["steps"]) == (5, [0, 2, 4])
    assert {row["group"] for row in losses["rows"]} == {"32, 64"}
    assert all((tmp_path / "run" / "gallery" / row["file"]).is_file() for row in losses["rows"])
    without = str(config("without", **settings | {"evaluate": {}, "output": str(tmp_path / "without")}))
    assert main(["train", without]) == 0
    half = {"output": str(tmp_path / "half"), "train__steps": 2}
    assert main(["train", str(config("half", **{**settings, **half}))]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", "train.steps=4"]) == 0
    assert (tmp_path / "half" / "losses" / files[-1].name).read_bytes() == files[-1].read_bytes()
    weights = [load_file(tmp_path / name / "adapter" / ADAPTER) for name in ("run", "without", "half")]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])


def test_a_finished_run_is_extended(config, tmp_path, caplog, capsys):
    """With a constant rate it ends as a run that was longer from the start."""
    caplog.set_level("INFO")
    run, settings = tmp_path / "run", {"sample__prompts": [], "adapter__parts": ["unet.attn"]}
    assert main(["train", str(config(**settings, train__steps=1))]) == 0
    longer = f"dora-mm train --resume {shlex.quote(str(run))} --set train.steps=2"
    assert longer in caplog.text
    before = files_in(run)
    caplog.clear()
    assert main(["train", "--resume", str(run)]) == 0
    assert f"Run {run} is finished: nothing is left to do, and nothing was written." in caplog.messages
    assert longer in caplog.text
    assert f"to sample  dora-mm sample --set {shlex.quote(f'adapter.path={run}')}" in capsys.readouterr().out
    assert files_in(run) == before
    (run / LOCK).touch()  # a kill behind the last file, and one in the middle of a request
    (run / ".sheet.png.5bce98f7-1.partial").touch()
    assert main(["train", "--resume", str(run)]) == 0
    assert files_in(run) == before
    assert main(["train", "--resume", str(run), "--set", "train.steps=2", "adapter.strength=0.5"]) == 0
    assert load_config(run / "config.yaml").train.steps == 2
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert json.loads((run / "step-000001" / "summary.json").read_text())["steps"] == 1
    longer = config("longer", output=str(tmp_path / "longer"), train__steps=2, **settings)
    assert main(["train", str(longer), "--set", "adapter.strength=0.5"]) == 0
    one, two = (load_file(tmp_path / each / "adapter" / ADAPTER) for each in ("run", "longer"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert main(["train", "--resume", str(run), "--set", "optimizer.eps=1.0"]) == 2
    assert "optimizer.eps cannot change from null to 1.0" in capsys.readouterr().err


def test_a_training_that_is_stopped_at_its_last_page_has_it_when_it_is_resumed(config, tmp_path, monkeypatch):
    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    path, run = config(train__steps=1, adapter__parts=["unet.attn"], sample__steps=1), str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(gallery_folder, "fill_gallery", stop)
        assert main(["train", str(path)]) == 130
    assert main(["train", "--resume", run]) == 0
    (about,) = data_of(tmp_path / "run" / "gallery" / "index.html")["trainings"]
    assert about["finished"]


def test_the_printed_command_draws_the_images_of_the_sheet(config, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    sample = {"prompts": [PROMPT], "seeds": [3, 4], "steps": 3, "guidance": 2.0, "negative_prompt": "blurry"}
    path = config(train__steps=1, adapter__parts=["unet.attn"], adapter__strength=1.5, sample=sample, output="run")
    assert main(["train", str(path)]) == 0
    printed = capsys.readouterr().out.partition("to sample  dora-mm ")[2]
    assert main([*shlex.split(printed), "output=drawn"]) == 0
    assert (
        "Settings that a row does not give, as in the training's contact sheets: steps 3, guidance 2, "
        "negative_prompt 'blurry'" in caplog.messages
    )
    drawn = Image.open(tmp_path / "drawn/samples/0001-seed3-strength1.png")
    shown = [entry.settings for entry in read_manifest(tmp_path / "run")]
    assert {each["strength"] for each in shown if each["adapter"]} == {1.0}  # of the file, as sample says
    assert largest_difference(Image.open(tmp_path / "run/adapter/pictures/1.png"), drawn) <= 1 / 255
    kept = load_config(tmp_path / "drawn/config.yaml")
    assert (kept.seeds, kept.steps, kept.guidance, kept.negative_prompt) == ((3, 4), 3, 2.0, "blurry")


@pytest.mark.slow
def test_results_that_were_deleted_come_again_in_the_same_bytes(config, tmp_path):
    assert main(["train", str(config(ema={"decay": 0.5}))]) == 0
    run = tmp_path / "run"
    before = files_in(run)
    for name in (f"adapter/{ADAPTER}", "adapter-ema", "sheet.png", "summary.json"):
        (shutil.rmtree if (run / name).is_dir() else Path.unlink)(run / name)
        assert main(["train", "--resume", str(run)]) == 0
        after = files_in(run)
        assert {other: after[other][0] for other in before} == {other: before[other][0] for other in before}
    assert main(["train", "--resume", str(run)]) == 0
    assert files_in(run) == after


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config(output=None, data__latent_cache="latents")
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    for words in (
        "buckets   64 x 64: 3, 128 x 32: 2 (h x w)",
        "captions  5 from metadata.jsonl",
        "4 steps x batch 2 / 5 images = each is seen 1.6 times",
        "Each image is seen 1.6 times, which is little for a style. For the usual 50 to 130 times set train.steps from",
        "unet.attn",
        "frozen in float32",
        "optimizer state (adamw, 2 numbers each)",
        "activations (an estimate",
        "s a step (measured)",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ((128, 64), "sheets    images of 128 px, the model's own size; the training is at 64 px"),
        ((64, 64), ""),
    ],
)
def test_a_dry_run_says_where_contact_sheets_have_another_size(config, sizes, line):
    own, trained = sizes
    loaded = load_config(config(), [f"data.resolution={trained}", "sample.prompts=[a bus]"])
    assert size_of_sheets(loaded, SimpleNamespace(resolution=own)).strip() == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a large model is measured")
@pytest.mark.slow
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_dry_run_loads_nothing_of_a_large_model_on_a_processor(
    config, tiny_folder, tmp_path, crop, capsys, monkeypatch
):
    from dora_mm.preview import training as preview

    monkeypatch.setattr(preview, "LARGE", 1000)
    folder = shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    changes = {"data__crop": crop, "train__gradient_checkpointing": crop == "center"}
    if crop == "random":
        make_adapter(tiny_folder, tmp_path / "assistant", seed=0)
        changes |= {"adapter__assistant": {"path": str(tmp_path / "assistant")}, "loss": {"guided_target": {}}}
    assert main(["train", str(config(model__path=str(folder), **changes)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in ("activations (", "together  ", "the activations take", "captions, 5 at once", "encoded", "decoded"):
        assert words in printed
    assert ("5 before the first step, 0.0 MB in main memory" in printed) == (crop == "center")
    for words in ("guided    target u + 3 (v - u)", f"assistant {tmp_path / 'assistant'}, strength 1, "):
        assert (words in printed) == (crop == "random")
    assert "time      not measured: a step of this model takes minutes to hours without a GPU" in printed
    assert "There is no GPU, and the model has" in printed


def test_a_dry_run_with_a_hub_model_that_is_not_here_describes_the_data(config, capsys):
    assert main(["train", str(config(model__path="owner/nothing")), "--dry-run"]) == 2
    printed, error = capsys.readouterr()
    assert "model.path: owner/nothing is not on this machine, and the hub (huggingface.co) cannot be reached" in error
    assert "captions  5 from metadata.jsonl" in printed
    assert "21 characters: a TOK icon of thing" in printed
    assert "owner/nothing is not on this machine: modules, memory and time are left out" in printed


REFUSED = (  # why, for a training in one process on a CPU
    "output RUN exists already: choose another folder",
    "train.track: wandb needs the package wandb: pip install wandb",
    "optimizer.name adamw_8bit needs a GPU",
    "train.compile: torch.compile does not work here",
    "model.quantization nf4 needs bitsandbytes",
)


@pytest.fixture
def wrong(config, tmp_path, monkeypatch):
    """A config with all of these, on a machine without the packages."""

    def find(name, package=None):
        return None if name in ("bitsandbytes", "wandb") else find_spec(name, package)

    for module in ("dora_mm.models.quantization", "dora_mm.train.trackers"):
        monkeypatch.setattr(f"{module}.find_spec", find)
    monkeypatch.setattr(compiled, "COMPILER", {"backend": "no such backend"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    return config(
        model__quantization="nf4",
        adapter__parts=["unet.attn"],
        optimizer={"name": "adamw_8bit", "lr": 0.01},
        train__compile=True,
        train__track=["wandb"],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of 8 bits are refused without a GPU")
def test_all_reasons_why_a_training_is_refused_are_in_one_report(wrong, tmp_path, monkeypatch, capsys):
    """Its dry run has the same, behind all that can be said without a step; the training reads nothing."""
    reasons = [reason.replace("RUN", str(tmp_path / "run")) for reason in REFUSED]
    assert main(["train", str(wrong), "--dry-run"]) == 2
    printed, error = capsys.readouterr()
    _, *report = error[error.index("5 problems stop this training:") :].splitlines()
    assert all(line.startswith(f"  {reason}") for line, reason in zip(report, reasons, strict=True))
    assert "time      not measured: optimizer.name adamw_8bit needs a GPU" in printed
    assert "optimizer state (adamw_8bit, 2 numbers of 8 bits each)" in " ".join(printed.split())
    for words in ("images  5 in", "unet.attn", "compiled", "activations (no gradient checkpointing", "VAE, an image "):
        assert words in printed
    assert "to start" not in printed

    recipe = PIPELINES.load("train_diffusion")
    for name in ("read_images", "load_image_model"):
        monkeypatch.delattr(recipe, name)
    assert main(["train", str(wrong), "--set", f"output={tmp_path / 'new'}"]) == 2
    error = capsys.readouterr().err
    assert "4 problems stop this training:" in error
    assert all(reason in error for reason in reasons[1:])
    assert not (tmp_path / "new").exists()


def test_a_dry_run_reports_paths_with_all_else(config, tmp_path, capsys):
    settings = {"data__folder": str(tmp_path / "nothing"), "adapter__init_from": str(tmp_path / "none")}
    assert main(["train", str(config(**settings, train__track=["trackio"])), "--dry-run"]) == 2
    error = capsys.readouterr().err
    for words in (f"data.folder: {tmp_path / 'nothing'} does not", f"adapter.init_from: {tmp_path / 'none'} does not"):
        assert error.count(words) == 1
    assert "train.track: trackio needs the package trackio" in error


def test_a_dry_run_of_a_run_that_goes_on_counts_what_is_left(config, tmp_path, capsys):
    path = str(config(sample__prompts=[], adapter__parts=["unet.attn"], train__steps=2))
    assert main(["train", path]) == 0
    run, before = tmp_path / "run", files_in(tmp_path)
    capsys.readouterr()
    command = ["train", "--resume", str(run), "--set", "train.steps=5"]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "left      3 of 5 steps: 2 are finished" in printed
    assert re.search(r"a step \(measured\), \S+ s for 3 steps", printed)
    assert printed.splitlines()[-1] == f"to go on  dora-mm {shlex.join(command)}"
    assert files_in(tmp_path) == before
    assert main([*command[:-1], "train.steps=1", "--dry-run"]) == 2
    assert f"train.steps: {run} has finished 2 steps, so it cannot end at 1" in capsys.readouterr().err


def test_warnings_before_a_long_training(config, caplog, monkeypatch):
    from dora_mm.preview import training as preview

    monkeypatch.setattr(preview, "half_precision_slowdown", lambda dtype: 16.0)
    changes = {"model__dtype": "bfloat16", "train__mixed_precision": "bf16", "train__steps": 1, "sample__prompts": []}
    assert main(["train", str(config(**changes))]) == 0
    assert "Each image is seen 0." in caplog.text
    assert ("emulates bf16, some 16 times slower" in caplog.text) == (not torch.cuda.is_available())


def test_a_hub_that_cannot_be_reached(config, capsys):
    assert main(["train", str(config(model__path="owner/nothing"))]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "dora-mm: model.path: owner/nothing is not on this machine, and the hub (huggingface.co) cannot be"
    )


CHANGED = {  # what is named in the message
    "the pictures and captions": "pictures/metadata.jsonl",
    "the weights of unet": "model/unet/diffusion_pytorch_model.safetensors",
    "the weights of text_encoder_2": "model/text_encoder_2/model.safetensors",
    "tokenizer/tokenizer_config.json of the model": "model/tokenizer/tokenizer_config.json",
    "the initial adapter": f"first/adapter/{ADAPTER}",
    "the assistant": f"assistant/{ADAPTER}",
}
REPLACED = {"pictures/metadata.jsonl": (b"thing 3", b"thing three")}  # in a file whose last character says nothing


def test_a_run_is_resumed_with_the_same_inputs_only(config, tmp_path, tiny_folder, capsys):
    """The last character of a file stays one of its kind; a longer training would read all of them."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = {"sample__prompts": [], "train__steps": 1, "model__path": str(model), "adapter__parts": ["unet.attn"]}
    assert main(["train", str(config("first", output=str(tmp_path / "first"), **settings))]) == 0
    shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "assistant")
    given = {"init_from": str(tmp_path / "first"), "assistant": {"path": str(tmp_path / "assistant")}}
    settings["adapter"] = {"rank": 4, "parts": settings.pop("adapter__parts"), **given}
    assert main(["train", str(config(**settings))]) == 0
    resume = ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]
    for what, name in CHANGED.items():
        file, before = tmp_path / name, (tmp_path / name).read_bytes()
        flipped = before[:-1] + bytes([before[-1] ^ 1]) if file.suffix == ".safetensors" else before + b"\n"
        file.write_bytes(before.replace(*REPLACED[name]) if name in REPLACED else flipped)
        assert file.read_bytes() != before
        assert main(resume) == 2
        assert f"{tmp_path / 'run'} cannot be resumed: {what} changed since" in capsys.readouterr().err
        file.write_bytes(before)
    assert main(resume) == 0


def test_a_run_that_cannot_be_resumed_is_refused_before_its_model_is_loaded(config, tmp_path, tiny_folder, capsys):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = {"sample__prompts": [], "train__steps": 1, "model__path": str(model), "adapter__parts": ["unet.attn"]}
    assert main(["train", str(config(**settings))]) == 0
    (model / "unet/config.json").write_text("{}")  # loading it would be another error
    resume = ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]
    assert main(resume) == 2
    assert "run cannot be resumed: unet/config.json of the model changed since" in capsys.readouterr().err
    with only_writer(tmp_path / "run"):
        assert main(resume) == 2
    assert "run has a writer already, process" in capsys.readouterr().err


def test_an_initial_adapter_of_another_rank_is_refused_before_weights_are_read(config, tiny_folder, tmp_path, capsys):
    model = shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    make_adapter(tiny_folder, tmp_path / "first", seed=0)
    first = tmp_path / "first" / ADAPTER
    settings = {"model__path": str(model), "adapter__init_from": str(first), "adapter__parts": ["unet.attn"]}
    assert main(["train", str(config(**settings))]) == 2
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"dora-mm: adapter.init_from: {first} has dora of rank 2 at {name}, and the config trains dora of rank 4 "
        "there: --set adapter.rank=2 adapter.alpha=2"
    )


BAD = {
    "no caption holds the placeholder": ({"data__placeholder": "SKS"}, "SKS"),
    "the run exists": ({"output": "."}, "exists"),
    "no such adapter": ({"adapter__init_from": "nowhere.safetensors"}, "nowhere.safetensors"),
    "an adapter for another model": ({"adapter__init_from": "foreign.safetensors"}, "foreign.safetensors"),
    "a broken image": ({"data__folder": "broken"}, "broken.png is empty"),
    "no such model": ({"model__path": "./nowhere"}, "nowhere"),
    "a package is missing": ({"optimizer": {"name": "prodigy", "lr": 1.0}}, "needs the package prodigyopt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_sentence_and_writes_nothing(config, tmp_path, name, capsys, monkeypatch):
    changes, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    foreign = {f"unet.mid_block.other.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(foreign, tmp_path / "foreign.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").touch()
    (tmp_path / "broken" / "broken.txt").write_text("a TOK icon of a bus")
    before = sorted(tmp_path.rglob("*"))
    path = config(**changes)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dora-mm: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == sorted({*before, Path(path)})


def test_epochs_are_converted_to_steps_which_the_run_keeps(config, image_folder, tmp_path, capsys):
    path = config(train__steps=None, train__epochs=3, data__repeats=2, sample__prompts=[])
    number = len(list(image_folder.glob("*.png")))  # two epochs of them are one of repeats: 2, in batches of 2
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"{3 * number} steps" in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    train = load_config(tmp_path / "run" / "config.yaml").train
    assert (train.steps, train.epochs) == (3 * number, None)
    assert last_step(tmp_path / "run" / "checkpoints") == 3 * number
    assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.epochs=4"]) == 0
    assert last_step(tmp_path / "run" / "checkpoints") == 4 * number

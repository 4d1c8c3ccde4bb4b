"""Sliders from a command to a grid, on a tiny model of each family, with captions and with pairs of images."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.tasks.slider import read_pairs
from dora_mm.train.metrics import read_metrics
from tests.shared.images.tiny_flows import EACH, NAMES
from tests.shared.killed import assert_same_weights, kill_after

CAPTIONS = {"plus": "a red {thing}", "minus": "a blue {thing}", "neutral": "a {thing}", "things": ["bus", "dog"]}
WEIGHTS = "pytorch_lora_weights.safetensors"


def write(tmp_path, model, name="run", *, parts=("unet.attn",), slider=None, **sections):
    values = {
        "pipeline": "train_slider",
        "output": str(tmp_path / name),
        "model": model,
        "adapter": {"rank": 2, "parts": list(parts)},
        "slider": slider or {**CAPTIONS, "denoising_steps": 3, "resolution": 64},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 2, "batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1},
        "sample": {"prompts": ["a bus"], "strengths": [-2, 0, 2], "steps": 2},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
    return path


def weights(run):
    return load_file(run / "adapter" / WEIGHTS)


def runs_and_resumes(tmp_path, model, **changes):
    """Trains at once, and with a stop after the first step; returns the run."""
    assert main(["train", str(write(tmp_path, model, **changes))]) == 0
    half = write(tmp_path, model, "half", **changes)
    assert main(["train", str(half), "--set", "train.steps=1"]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--set", "train.steps=2"]) == 0
    assert_same_weights("step-000002", tmp_path / "run", tmp_path / "half")
    return tmp_path / "run"


def test_sdxl_from_captions(tmp_path, tiny_folder, capsys):
    model = {"path": str(tiny_folder)}
    run = runs_and_resumes(tmp_path, model)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2]
    sheet = np.asarray(Image.open(run / "sheet.png").convert("RGB"))
    assert sheet.shape[1] > 3 * 128  # a column per strength
    assert f"to sample dora-mm sample --set adapter.path={run}" in capsys.readouterr().out
    job = ["sample", "--set", f"adapter.path={run}", "prompts=[a bus]", "strengths=[-1, 1]", "steps=2"]
    assert main([*job, f"output={tmp_path / 'drawn'}"]) == 0
    evaluates(run, tmp_path / "scores", capsys)
    drawn = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "drawn" / "samples").glob("*.png"))]
    assert len(drawn) == 2
    assert not np.array_equal(*drawn)


def evaluates(run, output, capsys):
    """Scores a slider by a command, twice: the second one generates nothing again."""
    config = output.with_suffix(".yaml")
    values = {"pipeline": "eval_slider", "output": str(output), "adapter": {"path": str(run)}, "seeds": [0]}
    config.write_text(yaml.safe_dump({**values, "strengths": [-1, 0, 1], "steps": 1, "batch_size": 8}))
    assert main(["eval", str(config)]) == 0
    found = json.loads((output / "metrics.json").read_text())
    assert {"slope": set(found["rows"]), "images": set(found["images"])} == dict.fromkeys(
        ("slope", "images"), {"slider", "control"}
    )
    likeness = found["images"]["slider"]["likeness to the neutral image"]
    assert likeness[1] == [[pytest.approx(1.0, abs=1e-5)]] * 2  # strength 0 is the base model
    assert "correlation of strength and attribute: slider" in capsys.readouterr().out
    times = {file: file.stat().st_mtime_ns for file in (output / "samples").rglob("*.png")}
    assert len(times) == 2 * (3 + 3 + 3)
    assert main(["eval", str(config)]) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_dry_run_writes_nothing_and_names_both_sides(tmp_path, tiny_folder, capsys):
    assert main(["train", str(write(tmp_path, {"path": str(tiny_folder)})), "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert "+         a red bus\n-         a blue bus\n0         a bus\n" in page
    assert "5 passes of the base model on average, and 2 backward passes, at strengths +1, -1" in page
    assert "s a step (measured)" in page
    assert not (tmp_path / "run").exists()


def test_a_resumed_slider_stays_the_same(tmp_path, tiny_folder, capsys):
    assert main(["train", str(write(tmp_path, {"path": str(tiny_folder)})), "--set", "train.steps=1"]) == 0
    resume = ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=2"]
    assert main([*resume, "slider.eta=2.0"]) == 2
    assert "slider.eta cannot change from 1.0 to 2.0: the finished steps minimized the old" in capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path):
    """Pairs whose plus images are brighter by 100."""
    for side, light in (("plus", 150), ("minus", 50)):
        folder = tmp_path / side
        folder.mkdir()
        for index in range(3):
            noise = np.random.default_rng(index).integers(0, 50, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(light)).save(folder / f"{index}.png")
    (tmp_path / "plus" / "0.txt").write_text("a bus")
    return {"images": {"plus": str(tmp_path / "plus"), "minus": str(tmp_path / "minus")}, "neutral": "a thing"}


def test_pairs_have_the_captions_of_the_plus_side(pairs, tmp_path, tiny_folder, capsys):
    config = write(tmp_path, {"path": str(tiny_folder)}, slider={**pairs, "resolution": 64})
    assert main(["train", str(config), "--dry-run"]) == 0
    assert f"3 pairs in {tmp_path / 'plus'} (+) and {tmp_path / 'minus'} (-)" in capsys.readouterr().out
    from dora_mm.config import load_config

    plus, minus = read_pairs(load_config(config).slider)
    assert [image.caption for image in plus] == [image.caption for image in minus] == ["a bus", "a thing", "a thing"]
    assert [image.path.parent.name for image in (plus[0], minus[0])] == ["plus", "minus"]


@pytest.mark.slow
def test_sdxl_from_pairs(pairs, tmp_path, tiny_folder):
    slider = {**pairs, "resolution": 64}
    run = runs_and_resumes(tmp_path, {"path": str(tiny_folder)}, slider=slider)
    assert weights(run)
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "minus" / "1.png")
    assert main(["train", "--resume", str(run), "--set", "train.steps=3"]) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "minus" / "2.png").unlink(), "have no pair for 2"),
        (
            lambda folder: Image.new("RGB", (96, 64)).save(folder / "minus" / "1.png"),
            "have 1 in two sizes (64 x 64 and",
        ),
        (lambda folder: shutil.rmtree(folder / "minus"), "slider.images.minus"),
    ],
)
def test_pairs_that_do_not_fit(pairs, tmp_path, tiny_folder, damage, message, capsys):
    damage(tmp_path)
    config = write(tmp_path, {"path": str(tiny_folder)}, slider={**pairs, "resolution": 64})
    assert main(["train", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flow", EACH, ids=NAMES)
def test_flow_models(flow, tmp_path, pairs):
    model = {"path": str(flow.build(tmp_path / "model"))} | ({flow.name: flow.settings} if flow.settings else {})
    assert main(["train", str(write(tmp_path, model, "captions", parts=["transformer.attn"]))]) == 0
    runs_and_resumes(tmp_path, model, parts=["transformer.attn"], slider={**pairs, "resolution": 64})


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tiny_folder):
    model, train = {"path": str(tiny_folder)}, {"steps": 12, "batch_size": 2, "checkpoint_every": 2}
    train |= {"keep_checkpoints": 9, "gradient_checkpointing": True}
    assert main(["train", str(write(tmp_path, model, train=train))]) == 0
    kill_after("step-000004", write(tmp_path, model, "killed", train=train), tmp_path / "killed")
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    assert_same_weights("step-000012", tmp_path / "run", tmp_path / "killed")
    trained, resumed = weights(tmp_path / "run"), weights(tmp_path / "killed")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)


@pytest.mark.slow
def test_checkpointed_activations_give_the_same_weights(tmp_path, tiny_folder):
    model = {"path": str(tiny_folder)}
    assert main(["train", str(write(tmp_path, model))]) == 0
    assert main(["train", str(write(tmp_path, model, "other")), "--set", "train.gradient_checkpointing=true"]) == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "other")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)

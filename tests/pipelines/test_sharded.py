"""Two processes, which divide the model or do not: as one that accumulates, and their own bits after kills."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dora_mm.cli import main
from dora_mm.train.checkpoint import last_step
from dora_mm.train.metrics import read_metrics
from dora_mm.train.state_file import read_state
from tests.pipelines.images.test_sample import make_adapter
from tests.pipelines.processes import kill_all, launched, wait_for
from tests.shared.data.vlm_rows import write_conversations, write_images
from tests.shared.killed import assert_same_weights
from tests.shared.vl import tiny_vlm as tiny

STEPS, LAST = 3, "step-000003"


def write(folder: Path, name: str, train: dict, **values) -> list[str]:
    """The command of a training, whose run directory has its name."""
    train = {"steps": STEPS, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1, **train}
    shared = {"adapter": {"rank": 2, "cache": "norms"}, "optimizer": {"lr": 0.01}, "ema": {"decay": 0.9}}
    values = {"output": str(folder / name), **shared, **values, "train": train}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return ["train", str(folder / f"{name}.yaml")]


def images(folder: Path, name: str, **train) -> list[str]:
    """Images of two shapes, a held-out one, and contact sheets on the way; a text encoder is trained, too.

    All over an assistant of more layers, and with a guided target.
    """
    return write(
        folder,
        name,
        train,
        pipeline="train_diffusion",
        model={"path": str(folder / "sdxl")},
        adapter={
            **{"rank": 2, "cache": "norms", "parts": ["unet.attn", "text_encoder.attn"], "strength": 1.5},
            "assistant": {"path": str(folder / "assistant"), "in_samples": True},
        },
        loss={"guided_target": {"scale": 2.0}},
        data={"folder": str(folder / "pictures"), "resolution": 64, "valid": {"share": 0.3, "limit": 1}},
        sample={"prompts": ["a TOK"], "steps": 1},
    )


def questions(folder: Path, name: str, **train) -> list[str]:
    """Conversations with no, one and two images: a batch need not reach the tower."""
    source = write_conversations(folder, folder / "noise")["train"]
    return write(
        folder,
        name,
        train,
        pipeline="train_vl",
        model={"path": str(folder / "llava"), "max_length": 64},
        adapter={"rank": 2, "cache": "norms", "parts": ["text.attn", "text.mlp", "vision.attn", "connector"]},
        data={"train": source, "valid": {**source}, "tables": str(folder / "tables")},
        evaluate={"every": 2, "max_new_tokens": 2},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "pictures").mkdir()
    (folder / "noise").mkdir()
    for index, size in enumerate([(64, 64), (64, 64), (44, 160), (64, 64), (44, 160)]):
        noise = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a TOK of thing {index}")
    write_images(folder / "noise")
    shutil.copytree(tiny_folder, folder / "sdxl")
    make_adapter(tiny_folder, folder / "assistant", seed=0)
    tiny.build("llava", folder / "llava")
    return folder


def run_both(folder: Path, *commands: list[str]) -> str:
    """Runs commands in two processes, one after the other, and returns what they say."""
    log = folder / "log"
    with launched(*commands, log=log) as process:
        assert process.wait(timeout=900) == 0, log.read_text()[-4000:]
    return log.read_text()


def curves(run: Path) -> list[dict]:
    rows = [row for name in (".", "validation") for row in read_metrics(run / name / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_runs(one: Path, other: Path) -> None:
    """Curves, weights, averages, adapters and contact sheets bit for bit."""
    assert curves(one) == curves(other)
    assert_same_weights(LAST, one, other)
    states = [read_state(run / "checkpoints" / LAST / "state.safetensors")["ema"] for run in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for file in sorted(path.relative_to(one) for path in one.glob("adapter*/*.safetensors")):
        assert load_file(one / file).keys() == load_file(other / file).keys()
        assert all(torch.equal(value, load_file(other / file)[key]) for key, value in load_file(one / file).items())
    for sheet in sorted(path.relative_to(one) for path in [*one.glob("*.png"), *one.glob("samples/*.png")]):
        assert (one / sheet).read_bytes() == (other / sheet).read_bytes()


def assert_close_runs(one: Path, other: Path) -> None:
    """Losses and weights up to rounding."""
    for row, found in zip(curves(one), curves(other), strict=True):
        assert row == pytest.approx(found, rel=1e-4, abs=1e-6)  # differences to the base model are small
    weights, others = (load_file(run / "checkpoints" / LAST / "trained_weights.safetensors") for run in (one, other))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-4)


def unfinished(run: Path, name: str) -> Path:
    """A copy of a run as a kill after its second step leaves it."""
    copy = shutil.copytree(run, run.with_name(name))
    for left in (f"checkpoints/{LAST}", "adapter", "adapter-ema"):
        shutil.rmtree(copy / left)
    (copy / "summary.json").unlink()
    return copy


@pytest.mark.slow
def test_images(folder, capsys):
    """One process accumulates what two compute, which divide the UNet or do not."""
    assert main(images(folder, "one", gradient_accumulation_steps=2)) == 0
    run_both(folder, images(folder, "whole"), images(folder, "divided", shard=True))
    assert_close_runs(folder / "one", folder / "whole")
    assert_close_runs(folder / "one", folder / "divided")
    for name in ("whole", "divided"):
        resumed = unfinished(folder / name, f"resumed_{name}")
        run_both(folder, ["train", "--resume", str(resumed)])
        assert_same_runs(resumed, folder / name)
    assert main(["train", str(folder / "divided.yaml"), "--set", f"output={folder / 'dry'}", "--dry-run"]) == 2
    shown, error = capsys.readouterr()
    assert "sharded over  MB in each" in shown
    assert "this is the only one: start several" in error
    assert main(images(folder, "alone", shard=True)) == 2
    assert "this is the only one: start several" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [images, questions])
def test_killed_runs(folder, kind):
    """Both processes are killed with SIGKILL on the way; what resumes has the bits of a run that was not."""
    whole, name = f"whole_{kind.__name__}", f"killed_{kind.__name__}"
    commands = kind(folder, whole, shard=True), kind(folder, name, shard=True)
    with launched(*commands, log=folder / "first") as process:
        wait_for(folder / name / "checkpoints" / "step-000002", process, seconds=600)
        kill_all(process)
    assert 2 <= last_step(folder / name / "checkpoints") < STEPS, (folder / "first").read_text()[-4000:]
    (folder / name / "sample-now").touch()
    shown = run_both(folder, ["train", "--resume", str(folder / name)])
    assert shown.count("parameters (") == 1  # only the main process informs
    assert_same_runs(folder / whole, folder / name)
    assert list((folder / name / "samples").glob(f"step-{STEPS:06d}*"))
    assert json.loads((folder / name / "summary.json").read_text())["steps"] == STEPS

"""A newcomer's way on a tiny model: new, train, sample, score, gallery, by the lines that each command prints."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_mm.cli import main
from dora_mm.config.generation import AdapterChoice, EvalStyleConfig
from dora_mm.recipes import PIPELINES
from dora_mm.sampling.manifest import read_manifest

SMALL = ["data.resolution=64", "train.steps=2", "train.batch_size=2", "sample.steps=1"]


def printed_command(lines: list[str], start: str) -> list[str]:
    """The arguments of the command in the last line that begins with `start`."""
    (line,) = [line for line in lines if line.startswith(start)]
    return shlex.split(line.partition("dora-mm ")[2])


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def week(tmp_path_factory, tiny_folder):
    """What the commands of a way have printed, by the command; it runs in a folder of its own, with two images."""
    folder = tmp_path_factory.mktemp("week")
    (folder / "mine").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.webp")):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "mine" / name)
        (folder / "mine" / name).with_suffix(".txt").write_text(
            f"a sks2 generating of a {['bus', 'cat', 'key'][number]}"
        )

    def run(*arguments: str, fresh: bool = False) -> list[str]:
        if fresh:
            command = [sys.executable, "-m", "dora_mm", *arguments]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            code, out, errors = done.returncode, done.stdout, done.stderr
        else:
            with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as told, chdir(folder):
                code = main(list(arguments))
            out, errors = said.getvalue(), told.getvalue()
        assert code == 0, errors
        assert "Loading" not in errors  # bars of libraries
        return (errors + out).splitlines()

    printed = {"folder": folder}
    printed["new"] = run("new", "sdxl", "style", "--images", "mine", "--model", str(tiny_folder))
    printed["train"] = run("train", "style.yaml", "--set", *SMALL)
    drawing = printed_command(printed["train"], "to sample")
    printed["sample"] = run(*drawing, fresh=True)
    few = ["steps=1", "guidance=1.0", "prompts_without_style=[a bus, a cat]", "prompts=[a sks2 bus, a sks2 key]"]
    score = ["eval", "configs/sdxl/eval_style.yaml", "--set", "adapter.path=runs/style/latest", *few]
    printed["eval"] = run(*score)
    printed["gallery"] = run(*printed_command(printed["eval"], "to look"))
    return printed


@pytest.mark.slow
def test_every_command_ends_with_the_next(week):
    assert printed_command(week["train"], "to sample") == [
        *("sample", "style_prompts.txt", "--set", "adapter.path=runs/style/001", "strengths=[0, 1]")
    ]
    assert printed_command(week["sample"], "to look") == ["gallery", "runs/style_prompts/001"]
    (folder,) = [line for line in week["sample"] if line.startswith("images")]
    assert folder == "images    8 of 8 in runs/style_prompts/001/samples"
    assert (
        "Settings that a row does not give, as in the training's contact sheets: steps 1, guidance 3" in week["sample"]
    )
    page, after = week["gallery"]
    assert page == "gallery  runs/eval_style/001/gallery/index.html"
    assert after.endswith(": dora-mm sample favourites.jsonl")


@pytest.mark.slow
def test_the_score_of_an_own_style(week):
    run = week["folder"] / "runs/eval_style/001"
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    parts = [f"{name}, {part}" for part in ("prompts in the style", "prompts without it")
             for name in ("bare model", "adapter", "adapter minus bare")]  # fmt: skip
    assert list(rows) == [*parts, "training images"]
    assert set(rows["adapter, prompts without it"]) == {"likeness", "nearest", "variety", "drift"}
    assert all(value["low"] <= value["mean"] <= value["high"] for row in rows.values() for value in row.values())
    printed = "\n".join(week["eval"])
    assert "beside 3 training images; seeds 0, 1;" in printed
    assert "clip_model or timm_model (DINOv2) names a better one" in printed
    assert " likeness)" in week["eval"][-1]  # what it means
    assert (run / "config.yaml").read_text().count("runs/style/001") == 1  # latest
    entries = read_manifest(run)
    assert len(entries) == 16
    assert all(entry.scores for entry in entries)
    with Image.open(run / "sheet.png") as page:  # most and least like: bare model, adapter, training image
        assert page.height > 2 * 3 * 128


def test_an_adapter_that_does_not_say_what_it_was_trained_on_needs_the_folder():
    recipe = PIPELINES.load("eval_style")
    config = EvalStyleConfig(pipeline="eval_style", name="a", adapter=AdapterChoice(path="a.safetensors"))
    with pytest.raises(ValueError, match="images: a.safetensors does not say what it was trained on"):
        recipe.training_images(config, None)


@pytest.mark.slow
def test_a_dry_run_ends_with_the_line_without_it(week, monkeypatch, capsys):
    monkeypatch.chdir(week["folder"])
    recipe = PIPELINES.load("train_diffusion")
    monkeypatch.setattr(recipe, "image_page", lambda *arguments: ["what it takes"])
    assert main(["train", "style.yaml", "--set", "seed=3", "data.folder=mine", "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "to start  dora-mm train style.yaml --set seed=3 data.folder=mine"

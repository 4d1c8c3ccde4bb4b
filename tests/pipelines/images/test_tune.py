"""A search for a learning rate on a tiny model with random weights: stopped, repeated, with other rates, by loss."""

import csv
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.data.images.folder import read_training_images
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images import own_style
from dora_mm.eval.images.encoder import Encoder
from dora_mm.studies.campaigns import selection_metrics, subprocesses, trainings
from dora_mm.studies.campaigns.subprocesses import TrainingProcess


@pytest.fixture
def style(tmp_path, tiny_folder, image_folder):
    values = {
        "pipeline": "train_diffusion",
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2},
        "data": {"folder": str(image_folder), "resolution": 64, "placeholder": "TOK", "valid": {"share": 0.3}},
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 4, "batch_size": 2, "log_every": 1},
        "sample": {"prompts": ["a TOK icon of a bus"], "steps": 2, "batch_size": 4},
    }
    path = tmp_path / "style.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def started(monkeypatch):
    """Runs trainings in this process; their names are in the list."""
    names = []

    def in_this_process(name, arguments, log_file, threads):
        names.append(name)
        assert main(arguments) == 0
        return TrainingProcess(name, SimpleNamespace(returncode=0, poll=lambda: 0), log_file)

    monkeypatch.setattr(trainings, "start_process", in_this_process)
    monkeypatch.setattr(subprocesses, "POLL_SECONDS", 0.0)
    return names


def test_a_dry_run_of_a_search_refuses_an_optimizer_that_cannot_step_here(style, capsys):
    if torch.cuda.is_available():
        pytest.skip("the optimizer steps on this GPU")
    assert main(["tune", str(style), "--dry-run", "--set", "optimizer.name=adamw_8bit"]) == 2
    assert "adamw_8bit needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on_and_trains_nothing_twice(
    style, started, tmp_path, monkeypatch, capsys, caplog
):
    folder = tmp_path / "search"
    command = ["tune", str(style), "--rates", "1e-3", "1e-2", "1e-1", "--set", "seed=3", "--output", str(folder)]
    drawn = selection_metrics.StyleSimilarityMetric.generated

    def interrupted(self, adapter, name):
        if len(started) == 2:
            raise KeyboardInterrupt
        return drawn(self, adapter, name)

    monkeypatch.setattr(selection_metrics.StyleSimilarityMetric, "generated", interrupted)
    monkeypatch.setattr(
        selection_metrics.StyleSimilarityMetric, "has_learned", lambda *args: True
    )  # images of a random model say nothing
    assert main(command) == 130
    assert not (folder / "tuned.yaml").exists()
    monkeypatch.setattr(selection_metrics.StyleSimilarityMetric, "generated", drawn)
    assert main(command) == 0
    short = [f"dora-r2-1_steps-lr{rate:g}-seed3" for rate in (1e-3, 1e-2, 1e-1)]
    assert started[:3] == short
    assert len(started) == 4  # one goes to the end at once
    assert started[3].startswith("dora-r2-4_steps-")
    printed = capsys.readouterr().out

    rows = {(row["setting"], row["rate"]): row for row in csv.DictReader((folder / "trainings.csv").open())}
    assert len(rows) == 4
    loaded_images = sorted((folder / "pictures" / short[0]).iterdir())
    assert [file.name for file in loaded_images[:2]] == ["0001-seed0.png", "0001-seed1.png"]
    encoder = Encoder("cpu")
    vectors = own_style.embedded_vectors(encoder, [Image.open(file) for file in loaded_images])
    images = read_training_images(load_config(style).data)
    known = own_style.embedded_vectors(encoder, [load_rgb(image.path, "white") for image in images])
    expected = own_style.scores_of(vectors, known, 2).cells[own_style.LIKENESS].mean()
    assert float(rows["1 steps", "0.001"]["value"]) == pytest.approx(expected, abs=2e-5)

    chosen = load_config(folder / "tuned.yaml")
    assert (chosen.name, chosen.seed, chosen.train.steps) == ("style", 3, 4)
    assert f"lr{chosen.optimizer.lr:g}-" in started[3]
    assert printed.endswith(f"dora-mm train {shlex.quote(str(folder / 'tuned.yaml'))}\n")
    assert str(folder / "runs" / started[3] / "adapter") in printed
    for name in ("table.md", "curves.csv", "curves.svg", "curves.png", "sheet.png"):
        assert (folder / name).is_file()

    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    caplog.clear()
    assert main(command) == 0
    (said,) = (message for message in caplog.messages if "circumstances" in message)
    assert said.startswith("9 of 9 kept trainings, scores and answers were computed under other circumstances")
    monkeypatch.delenv("MKL_CBWR")

    del started[:]
    more = ["tune", str(style), "--rates", "1e-3", "1e-2", "1e-1", "3e-2", *command[-4:]]
    assert main(more) == 0  # with other rates, what is there stays
    assert started[0] == "dora-r2-1_steps-lr0.03-seed3"
    assert not set(started) & set(short)
    assert main([*command, "--set", "adapter.alpha=3.0"]) == 2
    assert "was started with different values of overrides" in capsys.readouterr().err


@pytest.mark.slow
def test_where_nothing_was_learned_nothing_is_chosen(style, started, tmp_path, capsys):
    folder = tmp_path / "search"
    rates = ["--rates", "1e-9", "1e-8", "--set", "train.steps=2", "--output", str(folder)]
    assert main(["tune", str(style), *rates]) == 2
    assert "nothing is chosen, since no training of 2 steps has learned anything" in capsys.readouterr().err
    assert len(started) == 2  # both to the end at once
    assert "| against the bare model |" in (folder / "table.md").read_text()
    assert not (folder / "tuned.yaml").exists()


@pytest.mark.slow
def test_the_held_out_loss_judges_ranks_if_asked(style, started, tmp_path, capsys):
    folder = tmp_path / "search"
    command = ["tune", str(style), "--rates", "1e-3", "1e-2", "--ranks", "1", "2", "--selection-metric", "held_out"]
    assert main([*command, "--output", str(folder)]) == 0
    assert len(started) == 4 + 2 + 1
    rows = list(csv.DictReader((folder / "trainings.csv").open()))
    values = {row["rank"] + row["rate"]: float(row["value"]) for row in rows if row["setting"] == "4 steps"}
    assert np.all(np.array(list(values.values())) < 0)
    chosen = load_config(folder / "tuned.yaml")
    assert (
        f"Chosen: {chosen.optimizer.lr:g} at rank {chosen.adapter.rank}, the " in capsys.readouterr().out
    )  # lowest or highest
    assert not (folder / "sheet.png").exists()

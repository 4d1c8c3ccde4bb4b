"""Grids of images over two settings."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from dora_mm import load_adapter
from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.image_sampler import sample
from dora_mm.sampling.manifest import read_manifest
from tests.pipelines.images.test_sample import make_adapter


@pytest.fixture
def grid(tmp_path, monkeypatch, tiny_folder):
    """Runs a grid, with the values of its config as keyword arguments; returns its images in rows."""
    monkeypatch.chdir(tmp_path)

    def run(width, code=0, **values):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({"pipeline": "grid", "output": "out", "steps": 1, **values}, sort_keys=False))
        assert main(["grid", str(path)]) == code
        if code:
            return None
        entries = read_manifest(tmp_path / "out")
        assert {entry.status for entry in entries} == {"done"}
        files = [tmp_path / "out" / entry.file for entry in entries]
        return [files[start : start + width] for start in range(0, len(files), width)]

    return run


def pixels(path):
    return np.asarray(Image.open(path), dtype=np.int64)


def same(one, other):
    return pixels(one).shape == pixels(other).shape and np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.fixture(scope="session")
def styles(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("styles")
    for number in (1, 2):
        make_adapter(tiny_folder, folder / str(number), seed=number)
    return [str(folder / "1"), str(folder / "2")]


def test_a_column_is_without_adapter(grid, styles, tmp_path):
    rows = {"name": "prompt", "values": ["a bus", "a café, ένα, мир"]}
    drawn = grid(3, adapter={"path": styles[0]}, rows=rows, columns={"name": "strength", "values": [0.5, 1]})
    assert len(drawn) == 2
    for base, half, whole in drawn:
        assert not same(base, half)
        assert not same(half, whole)
    settings = [entry.settings["strength"] for entry in read_manifest(tmp_path / "out")]
    assert settings == [0, 0.5, 1] * 2
    assert Image.open(tmp_path / "out" / "sheet.png").width > 3 * 128


def test_an_axis_of_adapters(grid, styles, tiny_folder):
    both = f"{styles[0]}:0.25+{styles[1]}:1.5"
    ((base, one, other, mixed),) = grid(4, prompt="a bus", columns={"name": "adapter", "values": [*styles, both]})
    assert not any(same(first, second) for first, second in [(base, one), (one, other), (other, mixed), (one, mixed)])
    model = load_image_model(ModelConfig(path=str(tiny_folder)))
    for style, strength in zip(styles, (0.25, 1.5), strict=True):
        load_adapter(model.adaptable, style, name=style[-1], strength=strength)
    right = sample(model, ["a bus"], [0], steps=1)[0]
    assert np.abs(pixels(mixed) - np.asarray(right, dtype=np.int64)).max() <= 1


def test_adapters_as_rows_get_a_row_without(grid, styles):
    drawn = grid(
        2, prompt="a bus", rows={"name": "adapter", "values": styles}, columns={"name": "seed", "values": [1, 2]}
    )
    assert len(drawn) == 3
    assert not any(same(drawn[0][column], drawn[row][column]) for row in (1, 2) for column in (0, 1))


def test_axes_of_other_settings(grid, tiny_folder, tmp_path, caplog):
    drawn = grid(
        3,
        prompt="a bus",
        model={"path": str(tiny_folder)},
        rows={"name": "size", "values": [64, "96x64"]},
        columns={"name": "scheduler", "values": ["euler", "ddim", "unipc"]},
        steps=3,
    )
    assert [[Image.open(file).size for file in row] for row in drawn] == [[(64, 64)] * 3, [(96, 64)] * 3]
    assert not same(drawn[0][0], drawn[0][1])
    assert len([message for message in caplog.messages if message.startswith("No adapter: the images have")]) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": {"name": "strength", "values": [1]}}, "an axis of strengths or checkpoints needs an adapter"),
        ({"columns": {"name": "prompt", "values": ["a"]}}, "give either prompt or an axis of prompts"),
        ({"columns": {"name": "seed", "values": []}}, "columns.values is empty"),
        ({"columns": {"name": "seed", "values": ["1-3"]}}, "seed must be one seed per value"),
        ({"columns": {"name": "size", "values": ["big"]}}, "size must be such as 1024 or 832x1216"),
        ({"columns": {"name": "steps", "values": [0]}}, "steps must be greater than 0"),
        ({"columns": {"name": "scheduler", "values": ["eulr"]}}, "scheduler must be 'euler'"),
        (
            {"rows": {"name": "seed", "values": [1]}, "columns": {"name": "seed", "values": [2]}},
            "rows and columns are both",
        ),
    ],
)
def test_values_that_do_not_fit_their_axis(grid, tiny_folder, tmp_path, capsys, values, message):
    grid(1, code=2, prompt="a bus", model={"path": str(tiny_folder)}, **values)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_axis_of_checkpoints(grid, tiny_folder, image_folder, tmp_path, capsys):
    training = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder)},
        "adapter": {"rank": 2, "strength": 1.5},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"lr": 0.05},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    assert main(["train", str(tmp_path / "train.yaml")]) == 0
    adapter = {"path": str(tmp_path / "run")}
    ((base, second, fourth),) = grid(3, prompt="a bus", adapter=adapter, columns={"name": "checkpoint"})
    assert not same(base, second)
    assert not same(second, fourth)
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": "a bus", "adapter": str(tmp_path / "run")}))
    assert main(["sample", "jobs.jsonl", "--set", "output=final", "steps=1"]) == 0
    assert same(tmp_path / "final" / "samples" / "0001-seed0.png", fourth)
    grid(1, code=2, prompt="a bus", adapter=adapter, columns={"name": "checkpoint", "values": [3]}, output="x")
    assert "the run has no checkpoint of step 3, only 2, 4" in capsys.readouterr().err

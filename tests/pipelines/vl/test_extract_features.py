"""dora-mm features: from folders of images to a folder of features, interrupted and run again."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm import cli
from dora_mm.config import load_config
from dora_mm.config.models import VisionConfig
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.pixels import load_rgb
from dora_mm.models.vl.towers.tower import VisionTower, load_tower
from dora_mm.recipes import PIPELINES
from dora_mm.utils.lock import only_writer
from tests.shared.vl.small_towers import DIM

extract_features = PIPELINES.load("extract_features")


def draw(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def images(tmp_path):
    """A folder of images with numbered subfolders, as in NLVR2."""
    folder = tmp_path / "images"
    for index in range(5):
        draw(folder / str(index % 2) / f"{index}.png", index)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def config(tmp_path, images, vision):
    """The path of a config; JSON is valid YAML."""
    path = tmp_path / "mine.yaml"
    values = {
        "pipeline": "extract_features",
        "output": str(tmp_path / "out"),
        "images": [str(images)],
        "batch_size": 2,
    }
    path.write_text(json.dumps({**values, "vision": vision, "dtype": "float32"}))
    return path


def run(config, *overrides):
    return cli.main(["features", str(config), *(word for override in overrides for word in ("--set", override))])


@pytest.fixture
def computed(monkeypatch):
    """The sizes of the batches that the tower encoded."""
    sizes = []
    forward = VisionTower.forward

    def counting(self, pixels):
        sizes.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionTower, "forward", counting)
    return sizes


def test_a_folder_of_features_has_one_writer(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"):
        assert run(config) == 2
    assert "out has a writer already" in capsys.readouterr().err
    assert run(config) == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_features_equal_the_output_of_the_tower(config, vision, images, tmp_path, computed):
    assert run(config) == 0
    assert computed == [2, 2, 1]
    features = open_features([tmp_path / "out"])
    tower = load_tower(VisionConfig(**vision))
    assert features.dim == tower.feature_dim == DIM
    for path in images.rglob("*.png"):
        found = features[path.stem]
        torch.testing.assert_close(found, tower(tower.preprocess(load_rgb(path))[None])[0], atol=1e-4, rtol=1e-4)


def test_a_second_run_computes_new_and_changed_images(config, images, tmp_path, computed, caplog):
    assert run(config) == 0
    before = open_features([tmp_path / "out"])["1"]
    del computed[:]
    assert run(config) == 0
    assert computed == []
    assert "0 computed, 5 existed already" in caplog.text
    draw(images / "1" / "1.png", 77)
    draw(tmp_path / "more" / "new.jpg", 78)
    assert run(config, f"images=[{images}, {tmp_path / 'more'}]") == 0
    assert sum(computed) == 2
    features = open_features([tmp_path / "out"])
    assert not torch.equal(features["1"], before)
    assert "new" in features


def test_an_interrupted_run_is_continued(config, tmp_path, computed, monkeypatch, capsys):
    add = extract_features.FeatureWriter.add

    def interrupted(self, name, *values):
        if name == "3":
            raise KeyboardInterrupt
        add(self, name, *values)

    monkeypatch.setattr(extract_features.FeatureWriter, "add", interrupted)
    assert run(config) == 130
    monkeypatch.undo()
    done = [name for name in "01234" if name in open_features([tmp_path / "out"])]
    assert done == ["0", "1", "2", "4"]
    assert run(config) == 0
    assert all(name in open_features([tmp_path / "out"]) for name in "01234")


def test_bad_images_stop_the_run_or_are_named(config, images, tmp_path, capsys, caplog):
    (images / "1" / "broken.jpg").write_bytes(b"not an image")
    (images / "1" / "empty.png").write_bytes(b"")
    assert run(config) == 2
    assert re.fullmatch(r"dora-mm: images: .+broken.jpg is not a complete image \(.*\): replace or delete it\n",
                        capsys.readouterr().err)  # fmt: skip
    assert run(config, "on_bad_data=skip") == 0
    assert "2 images were skipped" in caplog.text
    assert "broken.jpg" in caplog.text
    assert "empty.png is empty" in caplog.text
    features = open_features([tmp_path / "out"])
    assert [name in features for name in ("0", "4", "broken", "empty")] == [True, True, False, False]


def test_readers_in_other_processes(config, tmp_path, computed, monkeypatch):
    """As with a GPU."""
    loader = extract_features.DataLoader
    monkeypatch.setattr(
        extract_features, "DataLoader", lambda *args, num_workers, **kw: loader(*args, num_workers=2, **kw)
    )
    assert run(config) == 0
    assert sum(computed) == 5
    assert all(name in open_features([tmp_path / "out"]) for name in "01234")


def test_half_precision_and_another_tower(config, tmp_path, capsys):
    assert run(config, "dtype=float16") == 0
    assert run(config, "dtype=float16", "vision.layers=[blocks.3]") == 2
    assert "out contains features of another tower, weights or layers" in capsys.readouterr().err
    assert run(config) == 2
    assert "contains features of dtype float16, not float32: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: draw(folder / "2.jpg", 0), "2.jpg have the same name"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.png")], "images contains no images (.png, .jpg"),
    ],
)
def test_folders_that_cannot_be_used(config, images, tmp_path, capsys, prepare, message):
    prepare(images)
    assert run(config) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_missing(config, capsys):
    assert run(config, "images=[nowhere]") == 2
    assert "images[0]: nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "dim"), [("features", 2048), ("features_tiny", 472)])
def test_the_example_configs(name, dim):
    config = load_config(f"configs/vl_bart/{name}.yaml")
    with torch.device("meta"):
        tower = load_tower(config.vision.model_copy(update={"pretrained": None}))
    assert (tower.feature_dim, tower.grid) == (dim, (7, 7))

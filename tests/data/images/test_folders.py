"""Several folders of images, each with its own settings."""

import shutil

import pytest
import torch
from pydantic import ValidationError

from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.data.images.folder import digest_of, read_training_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.data.images.resolutions import bucket_of
from dora_mm.preview.images import describe_images
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.losses import LossSum
from dora_mm.utils.randomness import generator


@pytest.fixture
def places(image_folder, tmp_path):
    """Two folders: five captioned images, and two of them without captions."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("0.png", "3.png"):
        shutil.copy(image_folder / name, plain)
    return str(image_folder), str(plain)


def data(*folders, **settings):
    return DataConfig.model_validate({"folders": list(folders), "resolution": 64, **settings})


def test_each_folder_has_its_own_settings(places):
    one, other = places
    folders = {"path": one, "repeats": 2.5}, {"path": other, "prompt": "a plain thing", "resolution": 96, "weight": 0.5}
    config = data(*folders)
    images = read_training_images(config)
    assert [(image.folder, image.repeats) for image in images] == [(0, 2.5)] * 5 + [(1, 1)] * 2
    assert {image.caption for image in images[5:]} == {"a plain thing"}
    assert {image.source for image in images[5:]} == {"data.folders[1].prompt"}
    assert bucket_of(images[0], config) == (64, 64)
    assert bucket_of(images[5], config) == (96, 96)
    lines = describe_images(images, config).splitlines()
    assert lines[:3] == [
        "images  7 in 2 folders",
        f"          5 in {one}, 2.5 times in an epoch",
        f"          2 in {other}, loss x 0.5, resolution 96",
    ]


def test_the_short_form_is_one_folder(places):
    short = DataConfig(folder=places[0], resolution=64)
    assert read_training_images(short) == read_training_images(data({"path": places[0]}))
    assert digest_of(read_training_images(short)) == digest_of(read_training_images(data({"path": places[0]})))


def test_a_folder_given_twice_counts_twice(places):
    """Kohya's trainer drops the second without a word."""
    images = read_training_images(data({"path": places[0]}, {"path": places[0], "resolution": 96}))
    assert len(images) == 10


def test_a_folder_to_validate_is_held_out(places, caplog):
    config = data({"path": places[0]}, {"path": places[1], "role": "validate", "prompt": "x", "resolution": 96})
    trained, held = hold_out(read_training_images(config), config)
    assert (len(trained), len(held)) == (5, 2)
    assert bucket_of(held[0], config) == (96, 96)
    assert "2 of the images in folders of role validate are also trained on" in caplog.text


def test_the_placeholder_is_looked_for_in_all_folders(places):
    folders = {"path": places[0]}, {"path": places[1], "prompt": "a thing"}
    assert len(read_training_images(data(*folders, placeholder="TOK"))) == 7
    with pytest.raises(ValueError, match=r"^data\.folders: no caption contains the placeholder SKS"):
        read_training_images(data(*folders, placeholder="SKS"))
    with pytest.raises(
        ValueError, match=r"^data\.folders\[1\] .*2 images .* without a caption: .* set data\.instance_pro"
    ):
        read_training_images(data({"path": places[0]}, {"path": places[1]}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"resolution": 64}, "give either folder or folders"),
        ({"folder": "a", "folders": [{"path": "b"}], "resolution": 64}, "give either folder or folders"),
        ({"folders": [{"path": "a", "role": "validate"}], "resolution": 64}, "no folder has the role train"),
        ({"folders": [{"path": "a", "repeats": 0.0}], "resolution": 64}, "greater than 0"),
        ({"folders": [{"path": "a", "weight": -1.0}], "resolution": 64}, "greater than 0"),
        ({"folders": [{"path": "a", "resolution": 72}], "resolution": 64}, "must be a multiple of 64 from 512"),
        (
            {"folders": [{"path": "a", "role": "validate", "weight": 2.0}], "resolution": 64},
            "have no effect on a folder",
        ),
        (
            {"folders": [{"path": "a"}, {"path": "b", "role": "validate"}], "valid": {"share": 0.1}, "resolution": 64},
            "give either valid or a folder of role validate",
        ),
        (
            {"folders": [{"path": "a"}], "valid": {"folder": "b"}, "resolution": 64},
            "valid.folder belongs to data.folder",
        ),
    ],
)
def test_contradictions_are_refused(values, problem):
    with pytest.raises(ValidationError, match=problem):
        DataConfig.model_validate(values)


def test_weights_are_in_the_sum_and_in_the_count(tiny, places):
    """Against the formula; elsewhere a weight is a hidden rate, because the mean divides by the number of images."""
    folders = {"path": places[0], "weight": 3.0}, {"path": places[1], "prompt": "x", "weight": 0.25}
    config = data(*folders)
    images = read_training_images(config)
    prompts = PromptEncoder(tiny, trained=False)
    batches = CaptionedBatches(tiny, images, prompts, config, batch_size=5, seed=1)
    task = DiffusionTask(tiny, LossConfig())
    number = next(n for n in range(9) if len(set(batches(n).weights.tolist())) == 2)
    batch = batches(number)
    with torch.no_grad():
        loss = task.loss(batch, generator(1, 0, "loss"))
        stream = generator(1, 0, "loss")
        noise = task.sample_noise(batch.latents, stream)
        each = task.losses(batch, noise, torch.randint(1000, (len(noise),), generator=stream))
    weights = torch.tensor([{0: 3.0, 1: 0.25}[images[row].folder] for row in batches.order(number)])
    torch.testing.assert_close(loss.mean, (weights * each).sum() / weights.sum())
    same = LossSum(10 * loss.total, 10 * loss.count)  # a common factor is no rate
    torch.testing.assert_close(same.mean, loss.mean)

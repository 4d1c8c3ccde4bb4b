"""Each image at each of several resolutions: which it has, the order, the caches, held-out images and the dry run."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dora_mm.config.images import DataConfig, LossConfig
from dora_mm.data.images.folder import CaptionedImage, read_training_images
from dora_mm.data.images.held_out import hold_out, part_of
from dora_mm.data.images.resolutions import at_resolutions, resolutions_of
from dora_mm.preview.image_sizes import measured_batches, remark_on_resolutions
from dora_mm.preview.images import describe_images, describe_latents, describe_length, repeats_of
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.held_out import NUM_TIMES, ImageLosses
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from tests.shared.images.pairs import noise

SIDES = {"large": (128, 128), "middle": (100, 100), "small": (64, 64), "tiny": (40, 40)}
IMAGES = [CaptionedImage(Path(f"{name}.png"), name, size, name) for name, size in SIDES.items()]
DATA = DataConfig(folder="pictures", resolutions=(64, 96, 128))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "sides"
    root.mkdir()
    for seed, (name, size) in enumerate(SIDES.items()):
        noise(size, seed).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"a {name} thing")
    return root


def batches(tiny, folder, *, batch_size=2, **settings):
    settings = {"folder": folder and str(folder), **settings}
    data = DataConfig.model_validate({"resolutions": [64, 96, 128], **settings})
    images, encoder = read_training_images(data), PromptEncoder(tiny, trained=False)
    return CaptionedBatches(tiny, images, encoder, data, batch_size=batch_size, seed=1)


def test_an_image_is_at_each_resolution_that_it_has_and_always_at_the_smallest():
    assert [resolutions_of(image, DATA) for image in IMAGES] == [[64, 96, 128], [64, 96], [64], [64]]
    views = at_resolutions(IMAGES, DATA)
    assert [(view.caption, view.resolution) for view in views[:4]] == [
        ("large", 64), ("large", 96), ("large", 128), ("middle", 64),
    ]  # fmt: skip
    assert at_resolutions(views, DATA) == views
    assert len(at_resolutions(IMAGES, DataConfig(folder="pictures", resolution=128))) == len(IMAGES)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resolution": 64, "resolutions": [64, 96]}, "give either resolution or resolutions"),
        ({}, "give either resolution or resolutions"),
        ({"resolutions": [64, 64]}, "must differ from each other"),
        ({"resolutions": [64, 100]}, "must be a multiple of 64 from 512 to 8192, or of 32 below 512, got 100"),
    ],
)
def test_mistakes(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"folder": "pictures", **keys})


def test_the_dry_run_counts_and_names():
    assert describe_images(IMAGES, DATA).splitlines() == [
        "images  4 in pictures",
        "sizes     64: 4, 96: 2, 128: 1, 7 in all; each image once at each size that it has",
        "left out  2 images have too few pixels for resolution 96 (small.png, tiny.png)",
        "left out  3 images have too few pixels for resolution 128 (middle.png, small.png, tiny.png)",
        "buckets   64 x 64: 4, 96 x 96: 2, 128 x 128: 1 (h x w)",
        "enlarged  1: they have less than 64 x 64 pixels",
    ]
    assert repeats_of(IMAGES, DATA) == [3, 2, 1, 1]
    assert remark_on_resolutions(IMAGES[:1], DATA) == []
    train = type("Train", (), {"steps": 70, "batch_size": 1, "gradient_accumulation_steps": 1})()
    assert "each is seen 10 to 30 times" in describe_length(repeats_of(IMAGES, DATA), train)


def test_an_epoch_has_each_image_once_at_each_size_in_batches_of_one_size(tiny, folder):
    all_batches = batches(tiny, folder, repeats=2)
    epoch = [all_batches.order(number) for number in range(len(all_batches.order.batches_of(0)))]
    seen = Counter(
        (all_batches.images[row].path.stem, all_batches.images[row].resolution) for rows in epoch for row in rows
    )
    sizes = {"large": (64, 96, 128), "middle": (64, 96), "small": (64,), "tiny": (64,)}
    assert seen == {(name, size): 2 for name, each in sizes.items() for size in each}
    with torch.no_grad():
        for number in range(len(epoch)):
            batch = all_batches(number)
            (target,) = {framing.target_size for framing in batch.framings}
            assert batch.latents.shape[-2:] == tuple(side // tiny.downscale for side in target)
    assert [batches(tiny, folder, repeats=2).order(number) for number in range(9)] == [
        all_batches.order(number) for number in range(9)
    ]


def test_a_folder_with_a_resolution_of_its_own_has_that_alone_and_repeats_and_weights_stay(tiny, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    noise((128, 128), 9).save(other / "own.png")
    folders = [
        {"path": str(folder), "repeats": 2, "weight": 0.5},
        {"path": str(other), "resolution": 96, "prompt": "own"},
    ]
    found = batches(tiny, None, folders=folders)
    views = [(image.path.stem, image.resolution, times, float(weight)) for image, times, weight in
             zip(found.images, found.order.repeats, found.weights, strict=True)]  # fmt: skip
    assert views[0] == ("large", 64, 2, 0.5)
    assert views[-1] == ("own", 96, 1, 1.0)
    assert len(views) == 8


def test_latents_of_each_size_are_kept_once(tiny, folder, tmp_path, monkeypatch):
    kept = {"latent_cache": str(tmp_path / "latents"), "flip": True}
    first = batches(tiny, folder, **kept)
    first.encode_all()
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 2 * 7
    monkeypatch.setattr(type(tiny), "encode_images", None)  # nothing is encoded again
    second = batches(tiny, folder, **kept)
    second.encode_all()
    assert torch.equal(first(0).latents, second(0).latents)


def test_the_memory_of_latents_in_the_dry_run_is_what_they_take(tiny, folder):
    found = batches(tiny, folder)
    found(0)
    (line,) = describe_latents(found, found.config)
    found.encode_all()
    size = sum(tensor.nbytes for kept in found.cache.memory.values() for tensor in kept.tensors.values())
    assert line.startswith(f"latents   7 before the first step, {size / 1e6:,.1f} MB")
    assert found.cache.bytes_per_cell == size / sum(
        (h // tiny.vae_downscale) * (w // tiny.vae_downscale) for ((h, w), *_) in found.layouts
    )


def test_a_step_of_each_size_is_measured_with_a_full_batch(tiny, folder):
    found = batches(tiny, folder, batch_size=3)
    numbers = measured_batches(found, 1)
    assert {size: count for size, (_, count) in numbers.items()} == {64: 2, 96: 1, 128: 1}
    assert len(found.order(numbers[64][0])) == 3
    assert measured_batches(batches(tiny, folder, resolutions=(), resolution=64), 1) == {64: (0, 2)}


def test_masks_have_the_size_of_each(tiny, folder):
    for name, size in SIDES.items():
        Image.new("L", size[::-1], 128).save(folder / f"{name}.mask.png")
    found = batches(tiny, folder, mask={})
    with torch.no_grad():
        for number in range(len(found.order.batches_of(0))):
            batch = found(number)
            assert batch.masks.shape[-2:] == batch.latents.shape[-2:]


def test_held_out_images_are_measured_at_each_size(tiny, folder):
    data = DataConfig.model_validate({"folder": str(folder), "resolutions": [64, 96, 128], "valid": {"share": 0.5}})
    trained, held = hold_out(read_training_images(data), data)
    assert (len(trained), len(held)) == (2, 2)
    part = CaptionedBatches(tiny, held, PromptEncoder(tiny, trained=False), data, batch_size=2, seed=0)
    assert part_of(part.images, 9) == sorted(held, key=lambda image: image.digest)
    losses = ImageLosses(DiffusionTask(tiny, LossConfig()), {"loss": part}, batch_size=4, precision=nullcontext)
    measured = [pair for batch in losses.batches["loss"] for pair in batch]
    assert len(set(measured)) == len(measured) == NUM_TIMES * len(at_resolutions(held, data))
    assert losses([tiny.unet])["loss"] > 0

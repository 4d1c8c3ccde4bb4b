"""The masked loss against a few lines of plain torch, and what is done outside of masks."""

import pytest
import torch

from dora_mm import DoRASpec, adapter_parameters, inject, set_strength
from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.core import base_model, fixed_parameters
from dora_mm.data.images.folder import read_training_images
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.randomness import generator
from tests.shared.data.images_made import half, write_mask


@pytest.fixture
def masked(tiny, image_folder):
    """The tiny model, trained a little; two images with a mask and one without it, and their batches."""
    write_mask(image_folder / "0.mask.png", half(64, 64))
    write_mask(image_folder / "2.mask.png", ~half(64, 64))

    def make(*, parts=("unet",), **mask):
        config = DataConfig(folder=str(image_folder), resolution=64, mask=mask, flip=True)
        images = [image for image in read_training_images(config) if image.size[0] in (64, 80)]
        prompts = PromptEncoder(tiny, trained=len(parts) > 1)
        return CaptionedBatches(tiny, images, prompts, config, batch_size=3, seed=1)

    return make


def adapt(tiny, *networks):
    for name in networks:
        inject(tiny.networks[name], tiny.target_maps[name].name, DoRASpec(rank=2))
        for index, (key, parameter) in enumerate(adapter_parameters(tiny.networks[name]).items()):
            if key.endswith("lora_B"):
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))


def drawn(task, batch):
    stream = generator(0, 0, "test")
    return task.sample_noise(batch.latents, stream), torch.tensor([100, 500, 900])


def test_each_image_has_the_mean_over_its_own_mask(tiny, masked):
    """Elsewhere a subject on a tenth of the image trains at a tenth of the rate, or images share one mask or mean."""
    batches = masked(floor=0.25)
    batch, task = batches(0), DiffusionTask(tiny, LossConfig(min_snr_gamma=None))
    noise, times = drawn(task, batch)
    with torch.no_grad():
        found = task.losses(batch, noise, times)
        noised = task.noise.noised(batch.latents, noise, times)
        errors = (
            tiny.predict(noised, times, batch.prompts, batch.framings) - task.noise.target(batch.latents, noise, times)
        ) ** 2
    expected = []
    for row, framing, error in zip(batches.order(0), batch.framings, errors, strict=True):
        name = batches.images[row].path.name
        mask = torch.ones(8, 8)
        if name != "1.png":
            mask = torch.from_numpy(half(8, 8) if name == "0.png" else ~half(8, 8)).float()
        mask = mask.flip(-1) if framing.flip else mask
        w = mask.clamp(min=0.25)
        expected.append((w * error.mean(0)).sum() / w.sum())
    torch.testing.assert_close(found, torch.stack(expected))


DISTANCES = {"mse": torch.square, "l1": torch.abs, "huber": lambda d: 2 * 0.1 * ((d**2 + 0.1**2).sqrt() - 0.1)}


@pytest.mark.parametrize(
    ("networks", "kind"),
    [(("unet",), "mse"), (("unet",), "l1"), (("unet",), "huber"), (("unet", "text_encoder", "text_encoder_2"), "mse")],
)
def test_outside_the_mask_the_base_model_is_the_target(tiny, masked, networks, kind):
    """At the distance of the loss, so that inside and outside weigh alike."""
    adapt(tiny, *networks)
    batches = masked(parts=networks, floor=0.0, outside="base")
    batch, task = batches(0), DiffusionTask(tiny, LossConfig(min_snr_gamma=None, type=kind))
    noise, times = drawn(task, batch)
    with torch.no_grad():
        found = task.losses(batch, noise, times)
        inside = task.losses(masked(parts=networks, floor=0.0)(0), noise, times)
        noised = task.noise.noised(batch.latents, noise, times)
        own = tiny.predict(noised, times, batches(0).prompts, batch.framings)
        for name in networks:
            set_strength(tiny.networks[name], 0.0)
        base = tiny.predict(noised, times, batches(0).prompts, batch.framings)
    outside, change = 1 - batch.masks, DISTANCES[kind](own - base).mean(1)
    total = outside.sum((1, 2))
    expected = inside + (outside * change).sum((1, 2)) / torch.where(total > 0, total, 1)
    torch.testing.assert_close(found, expected)
    assert (change.mean((1, 2)) > 1e-6).all()


def test_a_fresh_adapter_is_its_base_and_gets_the_same_gradients(tiny, masked):
    """The prediction at strength 0 is exact, so that nothing outside of the mask pulls at a fresh adapter."""
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    task, gradients = DiffusionTask(tiny, LossConfig()), []
    for outside in ("ignored", "base"):
        with fixed_parameters(tiny.unet):
            batch = masked(outside=outside)(0)
            noise, times = drawn(task, batch)
            task.losses(batch, noise, times).sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in adapter_parameters(tiny.unet).items() if p.grad is not None}
        )
        tiny.unet.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_base_model_is_exact_and_ends_no_guarantee(tiny):
    x, prompts = torch.randn(1, 4, 8, 8), tiny.encode_prompts(["a bus"])
    framing = [type("Framing", (), {"original_size": (64, 64), "crop_top_left": (0, 0), "target_size": (64, 64)})]
    times = torch.tensor([500])

    def predict():
        return tiny.predict(x, times, prompts, framing)

    with torch.no_grad():
        bare = predict()
        adapt(tiny, "unet")
        set_strength(tiny.unet, 0.7)
        with fixed_parameters(tiny.unet):
            before = predict()
            states = [m.adaptation for m in tiny.unet.modules() if hasattr(m, "adaptation")]
            kept = [state.num_passes for state in states]
            with base_model([tiny.unet]):
                assert torch.equal(predict(), bare)
            assert torch.equal(predict(), before)
            assert [state.num_passes for state in states] == kept
            assert None not in kept
        assert not torch.equal(before, bare)

"""Sheets, and images that depend only on their prompt and seed."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from dora_mm import DoRASpec, inject
from dora_mm.config.generation import SampleConfig
from dora_mm.core import adapted_layers
from dora_mm.sampling.before_after import at_strength, before_after_contact_sheet
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import ImageSampler, sample
from dora_mm.train.weights import swapped


def pixels(image):
    return np.asarray(image, dtype=np.int64)


def test_a_image_does_not_depend_on_its_batch(tiny):
    prompts, seeds = ["a bus", "a cat", "a key"], [5, 2, 9]
    together = sample(tiny, prompts, seeds, steps=2, batch_size=3)
    alone = [sample(tiny, [p], [s], steps=2)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together[0].size == (64, 64)
    for one, two in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[1])).max() > 10


def test_images_are_in_the_order_of_prompts_of_any_length(tiny):
    prompts, seeds = ["a bus", "a cat " * 60, "a key"], [5, 2, 9]
    together = sample(tiny, prompts, seeds, steps=2, batch_size=3)
    for image, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = sample(tiny, [prompt], [seed], steps=2)[0]
        assert np.abs(pixels(image) - pixels(alone)).max() <= 1


def test_samples_equal_plain_diffusers(tiny):
    ours = sample(tiny, ["a bus"], [5], steps=3, guidance=4.0, negative_prompt="red")[0]
    theirs = tiny.pipeline()(
        "a bus",
        negative_prompt="red",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=64,
    ).images[0]
    assert np.array_equal(pixels(ours), pixels(theirs))


def test_rescaled_guidance_is_that_of_diffusers(tiny):
    """On a model that predicts v and whose last noise level has no signal."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    tiny.components["scheduler"] = EulerDiscreteScheduler.from_config(tiny.scheduler.config, **settings)
    plain, ours = (sample(tiny, ["a bus"], [5], steps=3, guidance=7.0, guidance_rescale=r)[0] for r in (0.0, 0.7))
    theirs = tiny.pipeline()(
        "a bus",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=3,
        guidance_scale=7.0,
        guidance_rescale=0.7,
        height=64,
        width=64,
    ).images[0]
    assert np.array_equal(pixels(ours), pixels(theirs))
    assert np.abs(pixels(ours) - pixels(plain)).max() > 5


def test_strength_zero_is_the_base_model(tiny):
    base = sample(tiny, ["a bus"], [0], steps=2)[0]
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    for name, parameter in tiny.unet.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = {"unet": tiny.unet}
    zero, one = (at_strength(tiny, adapted, t, ["a bus"], [0], steps=2)[0] for t in (0.0, 1.0))
    assert np.array_equal(pixels(base), pixels(zero))
    assert np.abs(pixels(base) - pixels(one)).max() > 5


def test_half_precision_weights_are_merged_for_sampling_and_restored(tiny, monkeypatch):
    def same_noise(*args, dtype, **options):  # torch 2.11 generates other numbers for a seed in half precision
        return randn_tensor(*args, dtype=torch.float32, **options).to(dtype)

    monkeypatch.setattr(pipeline_stable_diffusion_xl, "randn_tensor", same_noise)
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    for name, parameter in tiny.unet.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    single = at_strength(tiny, {"unet": tiny.unet}, 1.0, ["a bus"], [0], steps=2)[0]
    for network in tiny.networks.values():
        network.bfloat16()
    before = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
    layer = next(iter(adapted_layers(tiny.unet).values()))
    merged = []
    hook = layer.register_forward_hook(lambda module, *_: merged.append(module.adaptation.merged))
    half = at_strength(tiny, {"unet": tiny.unet}, 1.0, ["a bus"], [0], steps=2)[0]
    base = at_strength(tiny, {"unet": tiny.unet}, 0.0, ["a bus"], [0], steps=2)[0]
    hook.remove()
    assert merged == [True, True, False, False]
    assert np.abs(pixels(half) - pixels(single)).mean() < 0.5 * np.abs(pixels(half) - pixels(base)).mean()
    after = tiny.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_sheet_is_drawn_at_the_configured_strength(tiny):
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    for name, parameter in tiny.unet.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    pages = {}
    for before_after in (False, True):
        for strength in (0.0, 1.0):
            config = SampleConfig(prompts=["a bus"], steps=2, before_after=before_after)
            page, _ = before_after_contact_sheet(tiny, {"unet": tiny.unet}, config, strength=strength)
            pages[before_after, strength] = page
    assert np.abs(pixels(pages[False, 0.0]) - pixels(pages[False, 1.0])).max() > 5
    assert pages[True, 1.0].height > pages[False, 1.0].height
    assert {layer.adaptation.strength for layer in adapted_layers(tiny.unet).values()} == {1.0}


def test_a_sheet_shows_the_bare_model_the_adapter_and_the_average_with_the_same_seeds(tiny):
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    trained = [parameter for name, parameter in tiny.unet.named_parameters() if name.endswith("lora_B")]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    config, networks = SampleConfig(prompts=["a bus"], steps=2, seeds=[3]), {"unet": tiny.unet}
    page, drawn = before_after_contact_sheet(
        tiny, networks, config, average=lambda: swapped({p: p / 2 for p in trained})
    )
    assert list(drawn) == ["before", "after", "average"]
    (two_rows, alone) = before_after_contact_sheet(tiny, networks, config)
    assert page.height > two_rows.height
    assert all(np.array_equal(drawn[label][0], alone[label][0]) for label in ("before", "after"))
    for parameter in trained:
        parameter.data /= 2
    _, halved = before_after_contact_sheet(tiny, networks, config)
    assert np.array_equal(drawn["average"][0], halved["after"][0])
    assert not np.array_equal(drawn["average"][0], drawn["after"][0])


def test_the_steps_of_a_image_are_told_and_change_nothing(tiny):
    sampler, told = ImageSampler(tiny), []
    settings = {"steps": 4, "guidance": 3.0, "width": 64, "height": 64}
    (image,) = sampler.generate([("a bus", None)], [0], **settings, on_step=told.append)
    assert told == [0.25, 0.5, 0.75, 1]
    (same,) = sampler.generate([("a bus", None)], [0], **settings)
    assert np.array_equal(image, same)


def test_a_sheet_contains_every_image():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rows = [[Image.new("RGB", (200, 100), colour) for colour in row] for row in colours]
    page = image_grid(rows, ["one", "two"], ["a very long label that must be wrapped", "b"])
    found = {colour for _, colour in page.getcolors(1 << 20)}
    assert {colour for row in colours for colour in row} <= found
    assert page.width > 400
    with pytest.raises(ValueError, match="label"):
        image_grid(rows, ["one"], ["a", "b"])

"""The guided target against a few lines of plain torch: u + s (v - u), u the model's own prediction, not trained."""

import pytest
import torch
from pydantic import ValidationError

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, formats
from dora_mm.config.images import DataConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.core import adapted_layers, fixed_parameters
from dora_mm.data.images.folder import read_training_images
from dora_mm.models.images.families import load_image_model
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.utils.randomness import generator
from tests.shared import reference
from tests.shared.images.tiny_flows import FLOWS

SCALE = 2.5
OF_DISTILLED = [flow for flow in FLOWS if flow.distilled]
FAST = [*(pytest.param(f, marks=pytest.mark.slow, id=f.name) for f in OF_DISTILLED[1:]), OF_DISTILLED[0]]


def batches_of(model, folder, prompt, **settings):
    """Batches of two images, with captions of which one is dropped now and then."""
    config = DataConfig(folder=str(folder), resolution=64, caption_dropout=0.4, **settings)
    prompts = PromptEncoder(model, trained=False, folder=config.text_cache)
    images = read_training_images(config)
    return CaptionedBatches(model, images, prompts, config, batch_size=2, seed=1, unguided=prompt)


def adapt(model, tmp_path, parts):
    """A trained adapter over an assistant."""
    network, targets = model.networks[model.denoiser], model.target_maps[model.denoiser].name
    for seed in (1, 2):
        dora_mm.inject(network, targets, DoRASpec(rank=2), parts=parts)
        for number, layer in enumerate(adapted_layers(network).values()):
            reference.randomize(layer, size=0.2, seed=100 * seed + number)
        if seed == 1:
            formats.save({model.denoiser: network}, tmp_path / "assistant", format="native", metadata={})
            dora_mm.remove(network)
    formats.load({model.denoiser: network}, tmp_path / "assistant", name="assistant", assists=True)
    return network


def task_of(model, prompt, schedule="constant"):
    guided = {"scale": SCALE, "prompt": prompt, "schedule": schedule}
    return DiffusionTask(model, LossConfig(min_snr_gamma=None, guided_target=guided))


def in_plain_torch(model, batch, unguided, noise, times, schedule="constant"):
    """The loss of each image."""
    at = times.view(-1, 1, 1, 1)
    if model.noise.prediction == "velocity":
        noised, v = (1 - at) * batch.latents + at * noise, noise - batch.latents
    else:
        process = model.noise.schedule  # the tiny one predicts v
        noised, v = (make(batch.latents, noise, times) for make in (process.add_noise, process.get_velocity))
    with torch.no_grad():
        u = model.predict(noised, times, unguided, batch.framings)
    target = u + (SCALE if schedule == "constant" else 1 + (SCALE - 1) * at) * (v - u)
    return ((model.predict(noised, times, batch.prompts, batch.framings) - target) ** 2).mean(dim=(1, 2, 3))


def gradients(network, losses):
    parameters = adapter_parameters(network)
    found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def check(model, network, batch, task, unguided, times):
    noise = task.sample_noise(batch.latents, generator(0, 0, "test"))
    with fixed_parameters(network, num_passes=1):  # as in a step
        found = task.losses(batch, noise, times)
        own = gradients(network, found)
    expected = in_plain_torch(model, batch, unguided, noise, times, task.config.guided_target.schedule)
    torch.testing.assert_close(found, expected)
    wanted = gradients(network, expected)
    assert own.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert max(float((own[name] - wanted[name]).abs().max()) for name in wanted) < 1e-4 * largest
    plain = DiffusionTask(model, LossConfig(min_snr_gamma=None)).losses(batch, noise, times)
    assert not torch.allclose(found, plain, rtol=0.01)


@pytest.mark.parametrize(("prompt", "schedule"), [("", "sigma"), ("a blurry photo", "constant")])
@pytest.mark.parametrize("flow", FAST, ids=lambda flow: flow.name)
def test_the_loss_and_its_gradients_are_those_of_plain_torch(flow, prompt, schedule, tmp_path, image_folder):
    section = {"path": str(flow.build(tmp_path / "model")), **({flow.name: flow.settings} if flow.settings else {})}
    model = load_image_model(validated(ModelConfig, section))
    batches = batches_of(model, image_folder, prompt)
    network = adapt(model, tmp_path, ["attn"])
    unguided = model.encode_prompts([prompt, prompt])
    check(model, network, batches(3), task_of(model, prompt, schedule), unguided, torch.tensor([0.3, 0.8]))


@pytest.mark.parametrize("prompt", ["", "a blurry photo"])
def test_a_model_that_predicts_noise_is_led_away_from_what_its_pipeline_takes_for_no_prompt(
    tiny, prompt, tmp_path, image_folder
):
    """Of SDXL, zeros."""
    batches, network = batches_of(tiny, image_folder, prompt), adapt(tiny, tmp_path, ["attn"])
    unguided = tiny.encode_prompts([prompt, prompt])
    if not prompt:
        unguided = [{name: torch.zeros_like(tensor) for name, tensor in each.items()} for each in unguided]
    check(tiny, network, batches(3), task_of(tiny, prompt), unguided, torch.tensor([300, 800]))


@pytest.mark.parametrize("kept", [False, True])
def test_its_prompt_is_encoded_ahead(tiny, tmp_path, image_folder, kept):
    """In main memory, and in files: afterwards the text encoders are not needed."""
    settings = {"text_cache": str(tmp_path / "text")} if kept else {}
    batches = batches_of(tiny, image_folder, "a blurry photo", **settings)
    expected = batches(0).unguided_prompts
    batches = batches_of(tiny, image_folder, "a blurry photo", **settings)
    batches.encode_all(2)
    tiny.components.release(tiny.text_encoders)
    found = batches(0).unguided_prompts
    assert len(found) == len(batches(0).prompts) == 2
    for one, other in zip(found, expected, strict=True):
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor)


def test_held_out_losses_have_it_too(tiny, tmp_path, image_folder):
    """What they are measured by is the batch of fixed images."""
    batches, network = batches_of(tiny, image_folder, "a blurry photo"), adapt(tiny, tmp_path, ["attn"])
    rows = [row for row, layout in enumerate(batches.layouts) if layout == batches.layouts[0]][:2]
    unguided = tiny.encode_prompts(["a blurry photo"] * 2)
    check(tiny, network, batches.fixed(rows), task_of(tiny, "a blurry photo"), unguided, torch.tensor([300, 800]))


@pytest.mark.parametrize("scale", [1.0, 0.5, -3.0])
def test_a_scale_that_guides_nowhere_is_refused(scale):
    with pytest.raises(ValidationError, match="greater than 1"):
        LossConfig(guided_target={"scale": scale})


def test_a_schedule_of_noise_levels_is_refused_where_there_are_none(tiny):
    with pytest.raises(ValueError, match=r"loss\.guided_target\.schedule: sigma is for models that predict a velocity"):
        task_of(tiny, "", schedule="sigma")

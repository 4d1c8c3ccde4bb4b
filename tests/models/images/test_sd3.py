"""Stable Diffusion 3: noise levels that its scheduler makes, and the loss of diffusers' training script."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3

from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from tests.shared.images.tiny_flows import PROMPT, SIZE
from tests.shared.images.tiny_sd3 import build


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "dynamic"])
def folder(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd3") / "model", uses_dynamic_shifting=request.param)


@pytest.fixture(scope="module")
def plain(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(folder):
    return load_image_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_images_are_the_pipelines_in_any_number_of_steps(model, plain, steps):
    settings = {"num_inference_steps": steps, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    theirs = plain(PROMPT, **settings, **SIZE).images[0]
    assert model.noise.schedule(steps, (8, 8)) == plain.scheduler.sigmas[:-1].tolist()
    (ours,) = sample(model, [PROMPT], [3], steps=steps, guidance=5.0)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2


def test_the_loss_is_that_of_the_training_script(model, plain):
    """Of train_dreambooth_lora_sd3.py with `--precondition_outputs 0`; with 1 it is weighted by the squared levels."""
    x, prompts = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [PROMPT, "", "a cat", "a dog"]
    ours = DiffusionTask(model, LossConfig()).loss(
        ConditionedLatents(x, model.encode_prompts(prompts), []), torch.Generator().manual_seed(3)
    )
    stream = torch.Generator().manual_seed(3)
    noise, u = torch.randn(x.shape, generator=stream), torch.randn(4, generator=stream).sigmoid()
    sigmas = model.noise.times(u, (8, 8)).view(-1, 1, 1, 1)  # the script takes the nearest of 1,000
    text, _, pooled, _ = plain.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    with torch.no_grad():
        predicted = plain.transformer(
            hidden_states=(1.0 - sigmas) * x + sigmas * noise,
            timestep=sigmas.flatten() * 1000,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
    per_image = (weighting * (predicted - (noise - x)) ** 2).reshape(4, -1).mean(1)
    torch.testing.assert_close(ours.mean, per_image.mean(), atol=1e-6, rtol=1e-5)


def test_levels_of_a_training_are_those_of_the_script(model, plain):
    """Its table of 1,000 has a fixed shift in it; a dynamic one it leaves out, and ours does not."""
    scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    u = torch.tensor([1000, 700, 250, 1]) / 1000
    expected = scheduler.sigmas[(1000 - u * 1000).long()]
    if scheduler.config.use_dynamic_shifting:
        expected = scheduler.time_shift(model.noise.mu(16, None), 1.0, expected)
    torch.testing.assert_close(model.noise.times(u, (8, 8)), expected, atol=1e-6, rtol=1e-6)

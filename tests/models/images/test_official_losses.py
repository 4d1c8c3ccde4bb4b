"""Inputs, losses, gradients and times of the flow families against diffusers' own training scripts.

official_losses.json keeps what the lines of the scripts computed, see official_losses.py. Figures are of float32: other
processors and releases add in other orders, which changes gradients by up to 9e-5 (Krea 2) and losses by 1e-6. A
weighting, a sign or a shift that is wrong changes them by percents.
"""

import json

import pytest
import torch

from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig, validated
from dora_mm.models.images.families import load_image_model
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from tests.models.images import official_losses as official

pytestmark = pytest.mark.slow
CLOSE = {"rel": 1e-5}
CLOSE_GRADIENTS = {"rel": 1e-3}
FAMILIES = json.loads(official.FIGURES.read_text(encoding="utf-8"))["families"]


@pytest.fixture(scope="module", params=official.OF_SCRIPTS, ids=lambda flow: flow.name)
def flow(request):
    return request.param


@pytest.fixture(scope="module")
def model(flow, tmp_path_factory):
    folder = official.build(flow, tmp_path_factory.mktemp(flow.name) / "model")
    section = {flow.name: flow.settings} if flow.settings else {}
    model = load_image_model(validated(ModelConfig, {"path": str(folder), **section}))
    model.transformer.requires_grad_(True).eval()
    return model


@pytest.fixture(scope="module")
def inputs(model):
    with torch.no_grad():
        latents = model.normalized(model.encode_images(official.pixels()).mean)
        return latents, model.encode_prompts(official.PROMPTS)


def test_latents_and_prompts_are_those_of_the_scripts(flow, inputs):
    latents, prompts = inputs
    assert official.norms(latents) == pytest.approx(FAMILIES[flow.name]["latents"], **CLOSE)
    assert official.norms(prompt["text"] for prompt in prompts) == pytest.approx(
        FAMILIES[flow.name]["prompts"], **CLOSE
    )


@pytest.mark.parametrize("scheme", official.SCHEMES)
def test_losses_and_gradients_are_those_of_the_scripts(flow, model, inputs, scheme):
    """At the times that the script has drawn; `logit_normal` is a way to draw them, without weights."""
    figures, (latents, prompts) = FAMILIES[flow.name]["schemes"][scheme], inputs
    task = DiffusionTask(model, LossConfig(weighting="none" if scheme == "logit_normal" else scheme))
    batch = ConditionedLatents(latents, prompts, [])
    model.transformer.zero_grad()
    loss = task.losses(batch, official.noise(latents.shape), torch.tensor(figures["sigmas"])).mean()
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], **CLOSE)
    found, expected = official.gradient_norms(model.transformer), figures["gradients"]
    least = 1e-6 * max(expected.values())  # of gradients that are 0 but for rounding
    assert found == pytest.approx(expected, **CLOSE_GRADIENTS, abs=least)


def test_times_are_those_of_the_scripts_under_the_familys_shift(flow, model, inputs):
    """Where the scheduler stretches its levels, a training does so as in infinitely many steps."""
    figures = FAMILIES[flow.name]["times"]
    task = DiffusionTask(model, LossConfig(timesteps="logit_normal"))
    shares = torch.special.ndtr(torch.tensor(figures["before"], dtype=torch.float64).logit())
    expected = torch.tensor(figures["after"], dtype=torch.float64)
    expected = 1 - (1 - expected) * (1 - (model.scheduler.config.shift_terminal or 0))
    torch.testing.assert_close(task.times_at(shares, inputs[0].shape[-2:]), expected, rtol=1e-5, atol=0)

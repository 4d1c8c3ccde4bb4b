"""The targets of sliders against plain torch, a backward pass per strength, and noise that depends on numbers alone."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils.checkpoint import CheckpointError

from dora_mm.adapting import networks
from dora_mm.config.models import validated
from dora_mm.config.slider import TrainSliderConfig
from dora_mm.core import adapted_layers, set_strength
from dora_mm.models.images.noise import Diffusion, Flow
from dora_mm.tasks.slider import CaptionSliderBatches, SliderTask, denoised_once
from tests.shared import reference

ETA = 1.5


def config_of(**slider):
    given = {"plus": "a red {thing}", "minus": "a blue {thing}", "neutral": "a {thing}", "things": ["bus", "dog"]}
    values = {
        "pipeline": "train_slider",
        "name": "test",
        "model": {"path": "samples/tiny-sdxl"},
        "adapter": {"rank": 2, "parts": ["unet.attn"]},
        "slider": {**given, "eta": ETA, "denoising_steps": 4, **slider},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "batch_size": 2},
    }
    return validated(TrainSliderConfig, values)


def adapted(model, config):
    """The trained parameters of a model with an adapter as a training would leave it."""
    found = networks.adapt(model.adaptable, model.target_maps, config.adapter, seed=0, backend="torch")
    for seed, layer in enumerate(adapted_layers(model.unet).values()):
        reference.randomize(layer, size=0.3, seed=seed)
    return found.parameters


def gradients(parameters):
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def test_the_target_and_the_gradients_are_those_of_plain_torch(tiny):
    """The reference is a copy of the base model, and weights W0 + t (W' - W0) that are written in plain torch."""
    config, bare = config_of(), copy.deepcopy(tiny)
    batches, task = CaptionSliderBatches(tiny, config), SliderTask(tiny)
    parameters = adapted(tiny, config)
    for number, strength in enumerate(config.strengths):
        batch = batches(number)
        things = batches._things(0)

        def predicted(caption, batch=batch, things=things):
            prompts = bare.encode_prompts([caption.format(thing=thing) for thing in things])
            with torch.no_grad():
                return bare.predict(batch.noised, batch.times, prompts, batch.framings)

        wanted = predicted("a {thing}") + strength * ETA * (predicted("a red {thing}") - predicted("a blue {thing}"))
        torch.testing.assert_close(batch.target, wanted, rtol=1e-4, atol=1e-5)
        loss = task.loss(batch, torch.Generator())
        assert float(loss.count) == 2
        loss.total.backward()
        ours = gradients(parameters)
        set_strength(tiny.unet, 0.25)  # what a pass leaves behind does not matter to the next one
        task.loss(batches(number), torch.Generator()).total.backward()
        again = gradients(parameters)
        assert all(torch.equal(ours[name], again[name]) for name in ours)
        wanted_gradient = of_plain_weights(bare, tiny, batch, wanted, strength)
        for name, gradient in wanted_gradient.items():
            torch.testing.assert_close(ours[name], gradient, rtol=2e-3, atol=1e-6)


def of_plain_weights(bare, model, batch, wanted, strength):
    """The gradients of the squared errors by autograd of functional_call, with weights in plain torch."""
    weights, leaves = {}, {}
    for path, layer in adapted_layers(model.unet).items():
        A, B, m = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
        W0 = layer.weight.detach()
        V = W0 + B @ A
        W = (m / V.norm(dim=1).detach())[:, None] * V  # norm_grad detached, as in the paper
        weights[f"{path}.weight"] = W0 + strength * (W - W0)
        leaves |= {f"unet.{path}.{name}": t for name, t in (("lora_A", A), ("lora_B", B), ("magnitude", m))}
    with torch.nn.utils.stateless._reparametrize_module(bare.unet, weights):
        predicted = bare.predict(batch.noised, batch.times, batch.prompts, batch.framings)
        (predicted - wanted).square().mean(dim=(1, 2, 3)).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_signs_that_share_a_backward_pass_fail_with_checkpointing_and_ours_do_not(tiny):
    config = config_of()
    batches, task = CaptionSliderBatches(tiny, config), SliderTask(tiny)
    parameters = adapted(tiny, config)
    tiny.unet.train()

    def separately():
        for number in range(2):
            task.loss(batches(number), torch.Generator()).total.backward()
        return gradients(parameters)

    wanted = separately()
    tiny.unet.enable_gradient_checkpointing()
    found = separately()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(CheckpointError):
        sum(task.loss(batches(number), torch.Generator()).total for number in range(2)).backward()


def test_a_group_has_one_noise_and_each_of_its_numbers_a_strength(tiny):
    config = config_of(strengths=[2, 0.5, -1])
    first, again, second = (CaptionSliderBatches(tiny, config, process) for process in ((0, 1), (0, 1), (1, 2)))
    for batches in (first, again, second):
        batches.encode_all()
    found = [first(number) for number in range(6)]
    assert [batch.strength for batch in found] == [2, 0.5, -1] * 2
    assert torch.equal(found[0].noised, found[2].noised)
    assert not torch.equal(found[0].noised, found[3].noised)
    assert torch.equal(again(4).target, found[4].target)  # whatever came before it
    assert torch.equal(second(0).noised, found[3].noised)  # the second process has the second group


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers_ddim(prediction):
    settings = {"beta_schedule": "scaled_linear", "prediction_type": prediction, "clip_sample": False}
    ddim = DDIMScheduler(**settings, timestep_spacing="trailing", set_alpha_to_one=False)
    ddim.set_timesteps(10)
    noise, x = Diffusion(ddim), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    predicted = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    t = ddim.timesteps[3]
    wanted = ddim.step(predicted, t, x).prev_sample
    found = denoised_once(noise, x, predicted, t.expand(2), ddim.timesteps[4].expand(2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_of_a_flow_is_eulers():
    x, velocity = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    t, lower = torch.tensor([0.8, 0.8]), torch.tensor([0.5, 0.5])
    found = denoised_once(Flow.__new__(Flow), x, velocity, t, lower)
    torch.testing.assert_close(found, x - 0.3 * velocity, rtol=1e-6, atol=1e-6)

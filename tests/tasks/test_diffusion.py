"""The diffusion loss against its closed form and diffusers' schedulers."""

import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.config.losses import LossConfig
from dora_mm.models.images.flux2_klein import KleinFlow
from dora_mm.models.images.noise import Diffusion, Flow
from dora_mm.registries.loss_weightings import LOSS_WEIGHTINGS
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask, min_snr_weight
from tests.shared.packages import outside_package


class RecordingModel:
    """A model that records what its denoiser is given, and returns a known prediction."""

    title = "a model"

    def __init__(self, noise, predict):
        self.noise, self.prediction, self.inputs = noise, predict, None

    def predict(self, noised, time, prompts, framings):
        self.inputs = (noised, time, prompts, framings)
        return self.prediction(noised, time)


def make_batch(count=6):
    return ConditionedLatents(torch.randn(count, 4, 8, 8), [{"text": torch.randn(7, 16)}] * count, ["framing"] * count)


SDXL_BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESSES = {
    "epsilon": Diffusion(EulerDiscreteScheduler(**SDXL_BASE)),
    "v_prediction": Diffusion(
        EulerDiscreteScheduler(**SDXL_BASE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ),
    "velocity": Flow(FlowMatchEulerDiscreteScheduler(shift=3.0), patch=2),
}


def make_task(predict, prediction="epsilon", **config):
    return DiffusionTask(RecordingModel(PROCESSES[prediction], predict), LossConfig(**config))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_the_closed_form(gamma, prediction):
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    weights = min_snr_weight(snr, gamma, prediction)
    for t in (0, 1, 250, 500, 999):
        value = float(snr[t])
        expected = min(value, gamma) / (value if prediction == "epsilon" else value + 1)
        assert weights[t] == pytest.approx(expected, rel=1e-12)


def test_v_prediction_weight_survives_zero_snr():
    assert min_snr_weight(torch.zeros(1), 5.0, "v_prediction").item() == 0


def test_without_gamma_every_timestep_has_the_same_weight():
    weights = make_task(lambda noisy, times: noisy, min_snr_gamma=None).weights(torch.arange(1000))
    assert torch.equal(weights, torch.ones(1000))


def test_noise_is_added_as_ddpm_does_and_predicting_it_has_zero_loss():
    batch = make_batch()
    task = make_task(lambda noisy, times: torch.zeros_like(noisy))
    loss = task.loss(batch, torch.Generator().manual_seed(3)).mean
    stream = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.latents.shape, generator=stream)
    times = torch.randint(1000, (6,), generator=stream)
    noisy, times_given, prompts, framings = task.model.inputs
    assert torch.equal(times_given, times)
    assert torch.equal(noisy, DDPMScheduler(**SDXL_BASE).add_noise(batch.latents, noise, times))
    assert (prompts, framings) == (batch.prompts, batch.framings)
    expected = (noise.square().mean(dim=(1, 2, 3)) * task.weights(times)).mean()
    assert torch.allclose(loss, expected)
    perfect = make_task(lambda *_: noise)
    assert perfect.loss(batch, torch.Generator().manual_seed(3)).mean == 0


def test_v_target():
    batch = make_batch()
    stream = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.latents.shape, generator=stream)
    times = torch.randint(1000, (6,), generator=stream)
    signal = PROCESSES["v_prediction"].schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * batch.latents
    perfect = make_task(lambda *_: velocity, "v_prediction")
    assert perfect.loss(batch, torch.Generator().manual_seed(3)).mean < 1e-12


def test_losses_count_by_the_weights_of_their_images():
    weights = torch.tensor([2.0, 1.0, 0.0, 0.5, 1.0, 3.0])
    batch = replace(make_batch(), weights=weights)
    task = make_task(lambda noisy, times: torch.zeros_like(noisy), min_snr_gamma=None)
    found = task.loss(batch, torch.Generator().manual_seed(3))
    each = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.total, (weights * each).sum())
    assert found.count == weights.sum()


def test_the_loss_is_a_function_of_its_generator():
    batch, task = make_batch(), make_task(lambda noisy, times: noisy)
    one, two, other = (task.loss(batch, torch.Generator().manual_seed(seed)).mean for seed in (1, 1, 2))
    assert one == two != other


def test_noise_offset_moves_whole_channels():
    batch = make_batch(64)
    task = make_task(lambda noisy, times: noisy, noise_offset=1.0)
    noise = task.sample_noise(batch.latents, torch.Generator().manual_seed(0))
    assert noise.mean(dim=(2, 3)).std() > 0.8


@pytest.mark.parametrize("bias", [-0.5, 0.0, 1.0, 3.0])
def test_timesteps_are_drawn_with_the_configured_density(bias):
    task = make_task(lambda noisy, times: noisy, timestep_bias=bias)
    times = task._times(torch.empty(20000, 4, 8, 8), torch.Generator().manual_seed(0))
    assert 0 <= times.min() < times.max() == 999
    for share in (0.25, 0.5, 0.9):  # P(t < q T) = q^(bias + 1)
        assert (times < 1000 * share).double().mean() == pytest.approx(share ** (bias + 1), abs=0.01)


@pytest.mark.parametrize("delta", [None, 0.01, 2.0])
@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_loss_types(kind, delta):
    batch = make_batch()
    settings = {"delta": delta} if kind == "huber" else {}
    task = make_task(lambda noisy, times: torch.zeros_like(noisy), type=kind, min_snr_gamma=None, **settings)
    size = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3)).abs().double()
    c = delta or 0.1
    expected = {"mse": size**2, "l1": size, "huber": 2 * c * ((size**2 + c**2).sqrt() - c)}[kind].mean()
    assert task.loss(batch, torch.Generator().manual_seed(3)).mean == pytest.approx(expected.item(), rel=1e-5)


def test_pseudo_huber_is_the_square_far_below_delta_and_a_multiple_of_the_size_far_above():
    task = make_task(lambda noisy, times: noisy, type="huber")
    small, large = torch.full((1, 1, 1, 1), 1e-5), torch.full((1, 1, 1, 1), 1e3)
    zero = torch.zeros(1, 1, 1, 1)
    assert task.distance(small, zero).item() == pytest.approx(1e-10, rel=1e-4)
    assert task.distance(large, zero).item() == pytest.approx(2 * 0.1 * 1e3, rel=1e-3)


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_delta_without_effect_is_refused(kind):
    with pytest.raises(ValueError, match=f"delta has no effect on type {kind}: set type=huber, or leave it out"):
        LossConfig(type=kind, delta=0.1)


def test_unsupported_predictions_are_refused():
    with pytest.raises(ValueError, match="predicts sample"):
        Diffusion(EulerDiscreteScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match="needs v_prediction"):
        Diffusion(EulerDiscreteScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, which is for models that predict v"):
        Diffusion(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="EulerDiscreteScheduler, which is for models that predict noise"):
        Flow(EulerDiscreteScheduler(), patch=2)


@pytest.mark.parametrize("prediction", PROCESSES)
def test_a_perfect_prediction_gives_back_the_latents(prediction):
    """The one-step estimate inverts how noise was added, whatever the network predicts."""
    batch, process = make_batch(3), PROCESSES[prediction]
    times = process.times(torch.tensor([0.001, 0.4, 0.9]), (8, 8))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    task = make_task(lambda *_: process.target(batch.latents, noise, times), prediction)
    latents = task.denoised(batch, times, torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, batch.latents, atol=1e-4, rtol=1e-4)


# --- rectified flow --------------------------------------------------------------------------------------------------

FLOWS = {
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "klein": {"use_dynamic_shifting": True},
}


def flow_of(name, steps=50):
    """A flow with tokens of 2 x 2 latents, its scheduler, and mu as its pipeline computes it of tokens and steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    if name == "klein":
        return KleinFlow(scheduler, 2, steps), scheduler, compute_empirical_mu
    own = scheduler.config
    return (
        Flow(scheduler, 2),
        scheduler,
        lambda tokens, _: calculate_shift(tokens, 256, 4096, own.base_shift, own.max_shift),
    )


@pytest.mark.parametrize("name", FLOWS)
@given(num_steps=st.integers(2, 60), height=st.integers(4, 90), width=st.integers(4, 90))
def test_one_function_gives_the_noise_levels_of_training_and_sampling(name, num_steps, height, width):
    """Those of diffusers' own scheduler, which the pipelines of these families use."""
    flow, theirs, mu = flow_of(name, steps=num_steps)
    num_tokens, even = height * width, torch.linspace(1, 1 / num_steps, num_steps)
    theirs.set_timesteps(sigmas=even.tolist(), mu=mu(num_tokens, num_steps))
    size = (2 * height, 2 * width)
    levels = torch.tensor(flow.schedule(num_steps, size))
    torch.testing.assert_close(levels, theirs.sigmas[:-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(flow.sigma(even, num_tokens, num_steps), theirs.sigmas[:-1], atol=1e-6, rtol=0)
    sampler = flow.sampler()
    sampler.set_timesteps(sigmas=levels.tolist())
    torch.testing.assert_close(sampler.sigmas[:-1], levels, atol=1e-6, rtol=0)
    if name != "terminal":
        torch.testing.assert_close(flow.times(even, size), levels, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_training_draws_from_the_levels_of_infinitely_many_steps(name):
    """Only klein's depend on how many steps of drawing a training is for."""
    num_steps = 20_000
    flow, theirs, mu = flow_of(name, steps=30)
    even = torch.linspace(1, 1 / num_steps, num_steps)
    theirs.set_timesteps(sigmas=even.tolist(), mu=mu(1024, 30))
    torch.testing.assert_close(flow.times(even, (64, 64)), theirs.sigmas[:-1], atol=2e-4, rtol=0)
    last = FLOWS[name].get("shift_terminal", 0.0)
    ends = flow.times(torch.tensor([0.0, 1.0]), (64, 64))
    torch.testing.assert_close(ends, torch.tensor([last, 1.0]), atol=1e-6, rtol=0)
    assert (flow_of(name, steps=4)[0].shift(1024) != flow.shift(1024)) == (name == "klein")


def test_a_flow_at_its_ends_is_the_image_and_the_noise():
    flow, x, e = PROCESSES["velocity"], torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(flow.noised(x, e, torch.zeros(2)), x)
    assert torch.equal(flow.noised(x, e, torch.ones(2)), e)
    assert torch.equal(flow.target(x, e, torch.ones(2)), e - x)
    assert torch.equal(flow.times(torch.tensor([0.0, 1.0]), (8, 8)), torch.tensor([0.0, 1.0]))


def test_times_of_a_flow_are_logit_normal_before_the_shift():
    times = make_task(lambda noisy, t: noisy, "velocity")._times(torch.empty(20000, 4, 8, 8), torch.Generator())
    u = times / (3 - 2 * times)  # the inverse of a shift by 3
    assert u.logit().mean() == pytest.approx(0, abs=0.03)
    assert u.logit().std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("mean", "std"), [(None, None), (0.5, 1.5)])
def test_times_are_drawn_as_diffusers_and_the_authors_of_log_snr_do(mean, std):
    own = {"timestep_mean": mean, "timestep_std": std}
    latents, stream = torch.empty(50, 4, 8, 8), torch.Generator()
    found = make_task(lambda noisy, t: noisy, "velocity", timesteps="logit_normal", **own)._times(
        latents, stream.manual_seed(1)
    )
    u = compute_density_for_timestep_sampling(
        "logit_normal", 50, mean or 0.0, std or 1.0, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(found, 3 * u / (1 + 2 * u))
    task = make_task(lambda noisy, t: noisy, "velocity", timesteps="log_snr", **own)
    t = task._times(torch.empty(20_000, 4, 8, 8), stream.manual_seed(1))
    logs = 2 * ((1 - t.double()) / t.double()).log()
    assert logs.mean() == pytest.approx(-6.0 if mean is None else mean, abs=0.05)
    assert logs.std() == pytest.approx(std or 2.0, abs=0.05)
    shares = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(task.times_at(shares, (8, 8)), t.quantile(shares), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_of_a_flow_are_those_of_diffusers(weighting):
    t = torch.linspace(0.01, 1, 50)
    found = make_task(lambda noisy, t: noisy, "velocity", weighting=weighting).weights(t)
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(weighting, t))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Another package's weightings: `soft` of noise and v, `late` of flows."""
    records = {"soft": "noise", "late": "flow"}
    lines = ["from dora_mm.registries.loss_weightings import LossWeighting"]
    for name, model in records.items():
        lines.append(f"{name.upper()} = LossWeighting('weightings:{name}', frozenset({{'{model}'}}))")
    lines += ["def soft(snr):", "    return 1 / (1 + snr)", "def late(sigma):", "    return 1 - sigma"]
    entries = {f"loss_weightings.{name}": f"weightings:{name.upper()}" for name in records}
    monkeypatch.syspath_prepend(outside_package(tmp_path, {"weightings.py": "\n".join(lines)}, entries))
    yield
    sys.modules.pop("weightings", None)
    vars(LOSS_WEIGHTINGS).pop("_added", None)
    LOSS_WEIGHTINGS._loaded.clear()


def test_weightings_of_another_package(outside):
    vars(LOSS_WEIGHTINGS).pop("_added", None)
    noise = make_task(lambda noisy, t: noisy, "epsilon", weighting="soft")
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(noise.weights(t), 1 / (1 + noise.noise.signal_to_noise(t)))
    t = torch.tensor([0.25, 1.0])
    assert make_task(lambda noisy, t: noisy, "velocity", weighting="late").weights(t).tolist() == [0.75, 0.0]
    for prediction, name, predicted in (("velocity", "soft", "noise or v"), ("v_prediction", "late", "a velocity")):
        with pytest.raises(ValueError, match=rf"loss\.weighting: {name} is for models that predict {predicted}"):
            make_task(lambda noisy, t: noisy, prediction, weighting=name)
    with pytest.raises(ValueError, match="weighting soft and min_snr_gamma exclude each other"):
        LossConfig(weighting="soft", min_snr_gamma=5.0)
    with pytest.raises(ValueError, match="did you mean 'cosmap'"):
        LossConfig(weighting="cosmp")


@pytest.mark.parametrize(("key", "value"), [("weighting", "cosmap"), ("timesteps", "log_snr")])
def test_keys_of_a_flow_are_refused_for_other_models(key, value):
    with pytest.raises(ValueError, match=rf"loss\.{key}: {value} is for models that predict a velocity"):
        make_task(lambda noisy, t: noisy, "epsilon", **{key: value})


@pytest.mark.parametrize(("key", "value"), [("min_snr_gamma", 5.0), ("noise_offset", 0.1)])
def test_keys_without_a_meaning_for_a_flow_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"loss\.{key} is for models that predict noise or v"):
        make_task(lambda noisy, t: noisy, "velocity", **{key: value})
    assert make_task(lambda noisy, t: noisy, "velocity").weights(torch.rand(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_default_gamma_is_that_of_min_snr():
    assert make_task(lambda noisy, t: noisy).gamma == 5.0
    assert make_task(lambda noisy, t: noisy, "velocity", type="huber", timestep_bias=1.0).timesteps == "uniform"

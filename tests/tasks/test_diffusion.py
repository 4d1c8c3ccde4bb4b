"""The diffusion loss against its closed form and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from dora_mm.config.images import LossConfig
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask, min_snr_weight


class RecordingUNet(torch.nn.Module):
    """Replaces the UNet: records its inputs and returns a known prediction."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.inputs = predict, None

    def forward(self, noisy, times, **conditions):
        self.inputs = (noisy, times, conditions)
        return type("Output", (), {"sample": self.predict(noisy, times)})


def make_batch(count=6):
    return ConditionedLatents(
        torch.randn(count, 4, 8, 8), torch.randn(count, 77, 16), torch.randn(count, 8), torch.randn(count, 6)
    )


def make_task(tiny, predict, **config):
    scheduler_config = {**tiny.scheduler.config, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return DiffusionTask(RecordingUNet(predict), scheduler_config, LossConfig(**config))


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


def test_without_gamma_every_timestep_has_the_same_weight(tiny):
    weights = make_task(tiny, lambda noisy, times: noisy, min_snr_gamma=None).weights(torch.arange(1000))
    assert torch.equal(weights, torch.ones(1000))


def test_noise_is_added_as_ddpm_does_and_predicting_it_has_zero_loss(tiny):
    batch = make_batch()
    task = make_task(tiny, lambda noisy, times: torch.zeros_like(noisy))
    loss = task.loss(batch, torch.Generator().manual_seed(3))
    stream = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.latents.shape, generator=stream)
    times = torch.randint(1000, (6,), generator=stream)
    noisy, times_given, conditions = task.unet.inputs
    assert torch.equal(times_given, times)
    assert torch.equal(noisy, task.schedule.add_noise(batch.latents, noise, times))
    assert conditions["added_cond_kwargs"]["time_ids"] is batch.time_ids
    expected = (noise.square().mean(dim=(1, 2, 3)) * task.weights(times)).mean()
    assert torch.allclose(loss, expected)
    perfect = make_task(tiny, lambda *_: noise)
    assert perfect.loss(batch, torch.Generator().manual_seed(3)) == 0


def test_velocity_target(tiny):
    config = {**tiny.scheduler.config, "prediction_type": "v_prediction"}
    batch = make_batch()
    stream = torch.Generator().manual_seed(3)
    noise = torch.randn(batch.latents.shape, generator=stream)
    times = torch.randint(1000, (6,), generator=stream)
    signal = DDPMScheduler.from_config(config).alphas_cumprod[times].view(-1, 1, 1, 1)
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * batch.latents
    perfect = DiffusionTask(RecordingUNet(lambda *_: velocity), config, LossConfig())
    assert perfect.loss(batch, torch.Generator().manual_seed(3)) < 1e-12


def test_the_loss_is_a_function_of_its_generator(tiny):
    batch, task = make_batch(), make_task(tiny, lambda noisy, times: noisy)
    one, two, other = (task.loss(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one == two != other


def test_noise_offset_moves_whole_channels(tiny):
    batch = make_batch(64)
    task = make_task(tiny, lambda noisy, times: noisy, noise_offset=1.0)
    noise = task._noise(batch.latents, torch.Generator().manual_seed(0))
    assert noise.mean(dim=(2, 3)).std() > 0.8


@pytest.mark.parametrize("bias", [-0.5, 0.0, 1.0, 3.0])
def test_timesteps_are_drawn_with_the_configured_density(tiny, bias):
    task = make_task(tiny, lambda noisy, times: noisy, timestep_bias=bias)
    times = task._times(20000, torch.Generator().manual_seed(0))
    assert 0 <= times.min() < times.max() == 999
    for share in (0.25, 0.5, 0.9):  # P(t < q T) = q^(bias + 1)
        assert (times < 1000 * share).double().mean() == pytest.approx(share ** (bias + 1), abs=0.01)


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_loss_types(tiny, kind):
    batch = make_batch()
    task = make_task(tiny, lambda noisy, times: torch.zeros_like(noisy), type=kind, min_snr_gamma=None)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    size = noise.abs()
    expected = {"mse": size**2, "l1": size, "huber": torch.where(size < 1, size**2 / 2, size - 0.5)}[kind].mean()
    assert torch.allclose(task.loss(batch, torch.Generator().manual_seed(3)), expected, rtol=1e-5)


def test_unsupported_predictions_are_refused(tiny):
    with pytest.raises(ValueError, match="predicts sample"):
        DiffusionTask(tiny.unet, {**tiny.scheduler.config, "prediction_type": "sample"}, LossConfig())
    with pytest.raises(ValueError, match="needs v_prediction"):
        DiffusionTask(tiny.unet, dict(EulerDiscreteScheduler(rescale_betas_zero_snr=True).config), LossConfig())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_the_latents(tiny, prediction):
    """The one-step estimate inverts how noise was added, whatever the network predicts."""
    batch, times = make_batch(3), torch.tensor([0, 400, 900])
    scheduler_config = {**tiny.scheduler.config, "prediction_type": prediction, "rescale_betas_zero_snr": False}
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    schedule = DDPMScheduler.from_config(scheduler_config)
    target = noise if prediction == "epsilon" else schedule.get_velocity(batch.latents, noise, times)
    task = DiffusionTask(RecordingUNet(lambda *_: target), scheduler_config, LossConfig())
    latents = task.denoised(batch, times, torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, batch.latents, atol=1e-4, rtol=1e-4)

"""The loss of image models: what the denoiser predicts for latents that were noised to a random time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dora_mm.config.losses import LossConfig
from dora_mm.core import base_model
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import ImageModel, Prompt
from dora_mm.registries.loss_weightings import LOSS_WEIGHTINGS
from dora_mm.registries.registry import load
from dora_mm.utils.losses import LossSum

GAMMA = 5.0  # of Min-SNR, where a config leaves it to us: that of its authors
NORMAL = {"logit_normal": (0.0, 1.0), "log_snr": (-6.0, 2.0)}  # mean and deviation, where a config leaves them to us
DELTA = 0.1  # of pseudo-Huber, likewise: kohya's `huber_c`


def pseudo_huber(d: torch.Tensor, delta: float) -> torch.Tensor:
    """2 delta (sqrt(d^2 + delta^2) - delta): d^2 far below delta, 2 delta |d| far above; a small d does not cancel."""
    return 2 * delta * d.square() / ((d.square() + delta**2).sqrt() + delta)


DISTANCES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {  # of a difference, and delta
    "mse": lambda d, _: d.square(),
    "l1": lambda d, _: d.abs(),
    "huber": pseudo_huber,
}


def sigma_sqrt(sigma: torch.Tensor) -> torch.Tensor:
    """Loss weights of noise levels (Esser et al. 2024, section 3.1)."""
    return sigma**-2.0


def cosmap(sigma: torch.Tensor) -> torch.Tensor:
    """Loss weights of noise levels, likewise."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@dataclass(frozen=True)
class ConditionedLatents:
    """A batch of B images with everything that the denoiser is conditioned on."""

    latents: torch.Tensor  # (B, C, h, w), normalized as the denoiser expects them
    prompts: Sequence[Prompt]  # B encoded captions
    framings: Sequence[Framing]  # how each was brought to its size
    weights: torch.Tensor | None = None  # (B,) of their losses; None: 1 each
    # Normalized latents (B, C, h, w) of the first reference of each image, the second, ...: all have the same sizes
    references: Sequence[torch.Tensor] = ()
    masks: torch.Tensor | None = None  # (B, h, w) how much each latent counts, up to 1; None: all alike
    # B captions as the base model reads them: outside the masks its prediction is the target; None: nothing is
    base_prompts: Sequence[Prompt] | None = None
    # B encodings of the prompt that the guided target leads away from; None: the target is that of the data
    unguided_prompts: Sequence[Prompt] | None = None
    preserved: "ConditionedLatents | None" = None  # where the base model's prediction is the target; None: nowhere
    preserved_weight: float = 0.0  # of the sum of these losses


class DiffusionTask:
    """The loss of a denoiser.

    Args:
        model: The model, whose denoiser is trained.
        config: The `loss` section.

    Raises:
        ValueError: The model cannot be trained, or a key of the section has no meaning for it.
    """

    def __init__(self, model: ImageModel, config: LossConfig):
        self.model, self.noise, self.config = model, model.noise, config
        self.is_flow = is_flow = self.noise.prediction == "velocity"
        has_own = is_flow or config.weighting != "none"
        self.gamma = (None if has_own else GAMMA) if config.min_snr_gamma == "auto" else config.min_snr_gamma
        for key, value in (("min_snr_gamma", self.gamma), ("noise_offset", config.noise_offset)):
            if is_flow and value:
                raise ValueError(
                    f"loss.{key} is for models that predict noise or v, and {model.title} does not: leave it out"
                )
        if not is_flow and config.timesteps == "log_snr":
            raise ValueError(f"loss.timesteps: log_snr is for models that predict a velocity, not for {model.title}")
        if not is_flow and config.guided_target and config.guided_target.schedule == "sigma":
            raise ValueError(
                f"loss.guided_target.schedule: sigma is for models that predict a velocity, not for {model.title}"
            )
        weighting = LOSS_WEIGHTINGS[config.weighting]
        if ("flow" if is_flow else "noise") not in weighting.models:
            predicted = "noise or v" if is_flow else "a velocity"
            raise ValueError(
                f"loss.weighting: {config.weighting} is for models that predict {predicted}, not for {model.title}"
            )
        self.weighting: Callable[[torch.Tensor], torch.Tensor] = load(weighting.import_path)
        uniform = config.timestep_bias or not is_flow
        self.timesteps = ("uniform" if uniform else "logit_normal") if config.timesteps == "auto" else config.timesteps

    def loss(self, batch: ConditionedLatents, generator: torch.Generator) -> LossSum:
        """The loss of a batch: a sum over its images, and their number; both with the weights of the images.

        With `min_snr_gamma` each image's loss is weighted by its time, too, but that does not count.

        Args:
            batch: B images.
            generator: Source of the noise and of the times.
        """
        noise, times = self.sample_noise(batch.latents, generator), self._times(batch.latents, generator)
        each = self.losses(batch, noise, times)
        weights = torch.ones_like(each) if batch.weights is None else batch.weights.to(each)
        total = (weights * each).sum()
        if (preserved := batch.preserved) is not None:
            if preserved.latents is not batch.latents:  # images of their own
                noise, times = (
                    self.sample_noise(preserved.latents, generator),
                    self._times(preserved.latents, generator),
                )
            total = total + batch.preserved_weight * self.changes(preserved, noise, times).sum()
        return LossSum(total, weights.sum())

    def changes(self, batch: ConditionedLatents, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """How far the prediction is from the base model's, by the distance of the loss: of each image (B,), float32.

        Args:
            batch: B images, with captions as both read them.
            noise: The noise (B, C, h, w).
            times: The times (B,), which weigh as they do in the loss.
        """
        times = times.to(batch.latents.device)
        noised = self.noise.noised(batch.latents, noise, times)
        base = self.base_prediction(batch, noised, times)
        change = self.distance(self._predict(batch, noised, times), base)
        return change.mean(dim=(1, 2, 3)) * self.weights(times)

    def losses(self, batch: ConditionedLatents, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The loss of each image (B,), float32, with this noise (B, C, h, w) and at these times (B,)."""
        times = times.to(batch.latents.device)
        noised = self.noise.noised(batch.latents, noise, times)
        target = self.noise.target(batch.latents, noise, times)
        if self.config.guided_target is not None:
            target = self.guided_target(batch, noised, times, target)
        predicted = self._predict(batch, noised, times)
        error = self.distance(predicted, target)
        if batch.masks is None:
            return error.mean(dim=(1, 2, 3)) * self.weights(times)
        counts = batch.masks.to(error)
        each = _masked_mean(error.mean(dim=1), counts)
        if batch.base_prompts is not None:
            change = self.distance(predicted, self.base_prediction(batch, noised, times))
            each = each + _masked_mean(change.mean(dim=1), 1 - counts)
        return each * self.weights(times)

    def distance(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The distance of every element of two predictions (B, C, h, w), float32, by the `type` of the config."""
        return DISTANCES[self.config.type](predicted.float() - wanted.float(), self.config.delta or DELTA)

    @torch.no_grad()
    def base_prediction(self, batch: ConditionedLatents, noised: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The prediction of the base model (B, C, h, w), with the assistant of the training if it has one.

        At strength 0 adapted layers equal base layers bit for bit.
        """
        assert batch.base_prompts is not None
        with base_model([self.model.networks[self.model.denoiser]], with_assistant=True):
            return self._predict(replace(batch, prompts=batch.base_prompts), noised, times)

    @torch.no_grad()
    def guided_target(
        self, batch: ConditionedLatents, noised: torch.Tensor, times: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """The target u + s (v - u): v is that of the data, u the prediction without a caption (B, C, h, w).

        Guidance is the same for noise, v and velocities: for one noised image each is an affine function of the other.
        """
        config = self.config.guided_target
        assert batch.unguided_prompts is not None
        assert config is not None
        unguided = self._predict(replace(batch, prompts=batch.unguided_prompts), noised, times).float()
        scale: float | torch.Tensor = config.scale
        if config.schedule == "sigma":
            scale = 1 + (scale - 1) * times.float().view(-1, 1, 1, 1)
        return unguided + scale * (target.float() - unguided)

    def times_at(self, shares: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """The quantiles (N,) of the training's distribution of times at these shares (N,).

        Args:
            shares: Numbers between 0 and 1.
            size: (h, w) of the latents.
        """
        if self.timesteps in NORMAL:
            return self._times_of_normal(torch.special.ndtri(shares), size)
        return self.noise.times(shares ** (1.0 / (1.0 + self.config.timestep_bias)), size)

    def _times_of_normal(self, z: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """The times (N,) at values (N,) of a standard normal distribution, which rise with them."""
        mean, deviation = NORMAL[self.timesteps]
        mean = mean if self.config.timestep_mean is None else self.config.timestep_mean
        deviation = self.config.timestep_std or deviation
        if self.timesteps == "log_snr":  # ln ((1 - t) / t)^2
            return ((deviation * z - mean) / 2).sigmoid()
        return self.noise.times((mean + deviation * z).sigmoid(), size)  # Esser et al. 2024 (arXiv 2403.03206)

    def denoised(self, batch: ConditionedLatents, times: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Noises the latents and estimates the clean latents in one step.

        Args:
            batch: B images.
            times: The time of each image (B,).
            generator: Source of the noise.

        Returns:
            The estimated latents (B, C, h, w).
        """
        noised = self.noise.noised(batch.latents, self.sample_noise(batch.latents, generator), times)
        return self.noise.clean(noised, self._predict(batch, noised, times).float(), times)

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """The loss weight (B,) of each time (B,).

        With gamma that of Hang et al. 2023 (arXiv 2303.09556); else by the `weighting` of the config.
        """
        if self.gamma is None:
            return self.weighting(times.float() if self.is_flow else self.noise.signal_to_noise(times))
        return min_snr_weight(self.noise.signal_to_noise(times), float(self.gamma), self.noise.prediction)

    def _predict(self, batch: ConditionedLatents, noised: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        if not batch.references:
            return self.model.predict(noised, times, batch.prompts, batch.framings)
        assert isinstance(self.model, EditingModel)
        return self.model.predict_edit(noised, times, batch.prompts, batch.framings, batch.references)

    def _times(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, device, size = len(latents), generator.device, latents.shape[2:]
        if self.timesteps in NORMAL:
            return self._times_of_normal(torch.randn(count, generator=generator, device=device), size)
        if self.noise.num_steps and not self.config.timestep_bias:
            return torch.randint(self.noise.num_steps, (count,), generator=generator, device=device)
        return self.times_at(torch.rand(count, generator=generator, device=device), size)

    def sample_noise(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Noise for latents (B, C, h, w), on their device, with the offset of the config."""

        def sample(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=generator.device).to(latents.device)

        noise = sample(*latents.shape)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * sample(*latents.shape[:2], 1, 1)
        return noise


def _masked_mean(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """sum(count value) / sum(count) over the latents (B, h, w) of each image (B,); 0 where nothing counts."""
    total = counts.sum(dim=(1, 2))
    return (counts * values).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """min(snr, gamma) / snr for "epsilon"; min(snr, gamma) / (snr + 1) for "v_prediction", where snr may be 0."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)

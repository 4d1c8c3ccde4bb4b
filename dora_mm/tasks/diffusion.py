"""The diffusion loss of SDXL."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from dora_mm.config.images import LossConfig

PER_ELEMENT = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


@dataclass(frozen=True)
class ConditionedLatents:
    """A batch of latents with everything that the UNet is conditioned on."""

    latents: torch.Tensor  # (B, C, h, w), normalized as the UNet expects them
    prompt: torch.Tensor  # prompt embeddings (B, L, D)
    pooled: torch.Tensor  # pooled prompt embeddings (B, P)
    time_ids: torch.Tensor  # micro-conditioning (B, 6)
    mask: torch.Tensor | None = None  # (B, L), False where a shorter prompt is padded; None: no prompt is padded


class DiffusionTask:
    """The loss of predicting the noise (or the velocity) of latents that were noised to a random timestep.

    Args:
        unet: The network, possibly wrapped by accelerate.
        scheduler_config: The config of the model's scheduler: how noise is added, and what the UNet predicts.
        config: The `loss` section.

    Raises:
        ValueError: The model predicts something other than epsilon or v; or it predicts epsilon although its last step
            has no signal at all, where epsilon is meaningless.
    """

    def __init__(self, unet: nn.Module, scheduler_config: dict, config: LossConfig):
        self.unet = unet
        self.config = config
        self.schedule: Any = DDPMScheduler.from_config(scheduler_config)  # annotated as a tuple
        self.prediction = self.schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"The model predicts {self.prediction}; only epsilon and v_prediction can be trained.")
        if self.prediction == "epsilon" and self.schedule.config.rescale_betas_zero_snr:
            raise ValueError("The model's schedule ends without any signal, which needs v_prediction, not epsilon.")

    def loss(self, batch: ConditionedLatents, generator: torch.Generator) -> torch.Tensor:
        """The mean loss of a batch, each image's weighted by min-SNR if the config sets `min_snr_gamma`.

        Args:
            batch: B images.
            generator: Source of the noise and of the timesteps.

        Returns:
            A scalar, float32.
        """
        latents = batch.latents
        count = len(latents)
        noise = self._noise(latents, generator)
        times = self._times(count, generator).to(latents.device)
        predicted = self._predict(batch, self.schedule.add_noise(latents, noise, times), times)
        target = noise if self.prediction == "epsilon" else self.schedule.get_velocity(latents, noise, times)
        error = PER_ELEMENT[self.config.type](predicted.float(), target.float(), reduction="none")
        return (error.mean(dim=(1, 2, 3)) * self.weights(times)).mean()

    def denoised(self, batch: ConditionedLatents, times: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Noises the latents and estimates the clean latents in one step.

        Args:
            batch: B images.
            times: The timestep of each image (B,).
            generator: Source of the noise.

        Returns:
            The estimated latents (B, C, h, w).
        """
        noised = self.schedule.add_noise(batch.latents, self._noise(batch.latents, generator), times)
        predicted = self._predict(batch, noised, times).float()
        signal = self.schedule.alphas_cumprod.to(times.device)[times].float().view(-1, 1, 1, 1)
        if self.prediction == "epsilon":
            return (noised - (1 - signal).sqrt() * predicted) / signal.sqrt()
        return signal.sqrt() * noised - (1 - signal).sqrt() * predicted

    def _predict(self, batch: ConditionedLatents, noised: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self.unet(
            noised,
            times,
            encoder_hidden_states=batch.prompt,
            encoder_attention_mask=batch.mask,
            added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids},
        ).sample

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """The loss weight (B,) of each timestep (B,): Hang et al. 2023 (arXiv 2303.09556), gamma from the config."""
        if self.config.min_snr_gamma is None:
            return torch.ones_like(times, dtype=torch.float32)
        signal = self.schedule.alphas_cumprod.to(times.device)[times].float()
        return min_snr_weight(signal / (1 - signal), self.config.min_snr_gamma, self.prediction)

    def _times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        steps = self.schedule.config.num_train_timesteps
        if not self.config.timestep_bias:
            return torch.randint(steps, (count,), generator=generator, device=generator.device)
        even = torch.rand(count, generator=generator, device=generator.device)
        return (steps * even ** (1.0 / (1.0 + self.config.timestep_bias))).long().clamp(max=steps - 1)

    def _noise(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=generator.device).to(latents.device)

        noise = draw(*latents.shape)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * draw(*latents.shape[:2], 1, 1)
        return noise


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """min(snr, gamma) / snr for "epsilon"; min(snr, gamma) / (snr + 1) for "v_prediction", where snr may be 0."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)

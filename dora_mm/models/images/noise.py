"""How latents are noised, and what a network is asked for: one class per kind of model.

Both have the same methods, so that the loss is written once (tasks/diffusion.py). x are latents without noise (B, C, h,
w), e is noise of the same shape, and a time t (B,) is what the network is told.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

LatentSize = Sequence[int]  # (h, w) of latents


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is for models that predict velocities."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


class NoiseProcess(Protocol):
    """Interface of a noise process: the noise that is added to latents, and the target of the prediction.

    Attributes:
        prediction: What the network predicts: "epsilon", "v_prediction" or "velocity".
        num_steps: The number of times of a discrete schedule; None: times are continuous.
    """

    prediction: str
    num_steps: int | None

    def times(self, u: Tensor, size: LatentSize) -> Tensor:
        """The times (B,) at shares u (B,) of the way from no noise, 0, to noise alone, 1."""
        ...

    def noised(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """The noised latents (B, C, h, w)."""
        ...

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """The training target (B, C, h, w) of the network's prediction."""
        ...

    def clean(self, noised: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The latents without noise (B, C, h, w) that follow from a prediction in float32."""
        ...

    def signal_to_noise(self, t: Tensor) -> Tensor:
        """The ratio (B,) of the variances of signal and noise, float32."""
        ...


class Diffusion:
    """Noise of a discrete schedule (Ho et al. 2020, arXiv 2006.11239), with epsilon or v as the target.

    Args:
        scheduler: The model's scheduler.

    Raises:
        ValueError: The model predicts something other than epsilon or v; or it predicts epsilon although its last step
            has no signal at all, where epsilon is meaningless.
    """

    def __init__(self, scheduler: Any):
        if is_flow(scheduler):
            raise ValueError(
                f"The model has a {type(scheduler).__name__}, which is for models that predict velocities."
            )
        self.schedule: Any = DDPMScheduler.from_config(scheduler.config)  # annotated as a tuple
        self.prediction: str = self.schedule.config.prediction_type
        self.num_steps: int | None = self.schedule.config.num_train_timesteps
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"The model predicts {self.prediction}; only epsilon and v_prediction can be trained.")
        if self.prediction == "epsilon" and self.schedule.config.rescale_betas_zero_snr:
            raise ValueError("The model's schedule ends without any signal, which needs v_prediction, not epsilon.")

    def times(self, u: Tensor, size: LatentSize) -> Tensor:
        steps = self.schedule.config.num_train_timesteps
        return (steps * u).long().clamp(max=steps - 1)

    def noised(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return self.schedule.add_noise(x, e, t)

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return e if self.prediction == "epsilon" else self.schedule.get_velocity(x, e, t)

    def clean(self, noised: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        signal = self._signal(t).view(-1, 1, 1, 1)
        if self.prediction == "epsilon":
            return (noised - (1 - signal).sqrt() * predicted) / signal.sqrt()
        return signal.sqrt() * noised - (1 - signal).sqrt() * predicted

    def signal_to_noise(self, t: Tensor) -> Tensor:
        signal = self._signal(t)
        return signal / (1 - signal)

    def _signal(self, t: Tensor) -> Tensor:
        """The share of the signal in the variance (B,)."""
        return self.schedule.alphas_cumprod.to(t.device)[t].float()


class Flow:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): noised = (1 - t) x + t e, and the network predicts e - x.

    Args:
        scheduler: The model's scheduler, whose config has the shift towards noise.
        patch: The side of the patches that are the network's tokens, in latents; the shift can depend on their number.

    Raises:
        ValueError: The scheduler is for models that predict noise.
    """

    prediction, num_steps = "velocity", None

    def __init__(self, scheduler: Any, patch: int):
        if not is_flow(scheduler):
            raise ValueError(f"The model has a {type(scheduler).__name__}, which is for models that predict noise.")
        self.config, self.patch = scheduler.config, patch

    def sigma(self, u: Tensor, num_tokens: int, num_steps: int | None = None) -> Tensor:
        """The noise levels (N,) at shares u (N,) of the way: what training draws from, and the steps of sampling.

        With s the shift, s u / (1 + (s - 1) u). It is fixed, or e^mu where mu rises with the number of tokens as in
        diffusers' `FlowMatchEulerDiscreteScheduler` (Esser et al. 2024, arXiv 2403.03206, section 5.3.2). Where the
        scheduler has a `shift_terminal`, levels are stretched so that the last step, at 1 / num_steps, has that one.

        Args:
            u: The shares.
            num_tokens: The tokens of an image.
            num_steps: The steps of sampling; None: in training, which is as in infinitely many for the stretch.
        """
        shift = self.shift(num_tokens, num_steps)

        def shifted(at: Tensor) -> Tensor:
            return shift * at / (1 + (shift - 1) * at)

        if not (last := self.config.shift_terminal) or num_steps == 1:
            return shifted(u)
        least = shifted(torch.tensor(1 / num_steps if num_steps else 0.0))
        return 1 - (1 - shifted(u)) * (1 - last) / (1 - least)

    def shift(self, num_tokens: int, num_steps: int | None = None) -> float:
        """The shift s for a number of tokens, in some families also of steps of sampling (None: in training)."""
        if not self.config.use_dynamic_shifting:
            return float(self.config.shift)
        mu = self.mu(num_tokens, num_steps)
        return math.exp(mu) if self.config.time_shift_type == "exponential" else mu

    def mu(self, num_tokens: int, num_steps: int | None) -> float:
        """The parameter mu of a shift that depends on the number of tokens, as the family's pipeline computes it."""
        config = self.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (num_tokens - config.base_image_seq_len)

    def schedule(self, num_steps: int, size: LatentSize) -> list[float]:
        """The noise levels of sampling in `num_steps` steps, from noise; the last step ends at 0, which is left out."""
        return self.sigma(torch.linspace(1, 1 / num_steps, num_steps), self._num_tokens(size), num_steps).tolist()

    def sampler(self) -> FlowMatchEulerDiscreteScheduler:
        """Diffusers' scheduler for the levels of `schedule`, which it must not move again."""
        as_they_are = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
        found: Any = FlowMatchEulerDiscreteScheduler.from_config(self.config, **as_they_are)
        return found

    def times(self, u: Tensor, size: LatentSize) -> Tensor:
        return self.sigma(u, self._num_tokens(size))

    def noised(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x + t * e

    def target(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return e - x

    def clean(self, noised: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        return noised - t.view(-1, 1, 1, 1) * predicted

    def signal_to_noise(self, t: Tensor) -> Tensor:
        return ((1 - t) / t).square().float()

    def _num_tokens(self, size: LatentSize) -> int:
        return (size[0] // self.patch) * (size[1] // self.patch)


class SchedulerFlow(Flow):
    """The noise levels of pipelines that leave the steps of sampling to their scheduler.

    Its last step is at the least level that it knows, not at 1 / num_steps; a fixed shift moves that one twice.
    """

    def schedule(self, num_steps: int, size: LatentSize) -> list[float]:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        mu = self.mu(self._num_tokens(size), num_steps) if self.config.use_dynamic_shifting else None
        scheduler.set_timesteps(num_steps, mu=mu)
        return scheduler.sigmas[:-1].tolist()

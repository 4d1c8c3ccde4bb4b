"""The config section of the loss of image models. See schema.py for the rules."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dora_mm.config.schema import NonNegative, Positive, Section, name_in, raise_problems
from dora_mm.registries.loss_weightings import LOSS_WEIGHTINGS


class GuidedTargetConfig(Section):
    """The target u + scale (v - u) instead of v, the target of the data.

    u is the prediction of the model as it is, its adapters included, without a gradient and under `prompt`. A model
    that was distilled to generate without guidance predicts what guidance makes of two predictions: v alone would make
    it unlearn that.
    """

    scale: Annotated[float, Field(gt=1)] = 3.0  # of the guidance that was distilled into the model
    # sigma: 1 + (scale - 1) s instead of it at noise level s, of models that predict velocities: at low levels v - u is
    # mostly the noise of one image, which nothing predicts
    schedule: Literal["constant", "sigma"] = "constant"
    # of what guidance leads away from; "": what the family's pipeline takes without a negative prompt
    prompt: str = ""


class LossConfig(Section):
    type: Literal["mse", "huber", "l1"] = "mse"  # distance between prediction and target; huber: pseudo-Huber
    delta: Positive | None = None  # of huber: where it turns from squared to absolute, at all noise levels; null: 0.1
    # Of models that predict noise or v: gamma of Min-SNR loss weights; auto: 5; null: every timestep has weight 1
    min_snr_gamma: float | str | None = "auto"
    noise_offset: NonNegative = 0.0  # of these models: standard deviation of noise that is constant over an image
    # How timesteps are sampled; auto: logit_normal for models that predict velocity, uniform for others or with a bias.
    # log_snr: the logarithm of signal to noise is normal, after any shift: around -6 it is mostly noise, where a style
    # is decided (Choi et al. 2024, arXiv 2411.14793)
    timesteps: Literal["auto", "uniform", "logit_normal", "log_snr"] = "auto"
    timestep_bias: Annotated[float, Field(gt=-1)] = 0.0  # of uniform: the density becomes t^bias, before any shift
    timestep_mean: float | None = None  # of logit_normal (null: 0), before any shift, and of log_snr (null: -6)
    timestep_std: Positive | None = None  # of logit_normal (null: 1) and log_snr (null: 2)
    # Of models that predict velocity, by noise level s: sigma_sqrt: 1 / s^2; cosmap: 2 / (pi (1 - 2 s + 2 s^2))
    weighting: Annotated[str, name_in(LOSS_WEIGHTINGS)] = "none"
    guided_target: GuidedTargetConfig | None = None  # for models that were distilled to generate without guidance

    @field_validator("min_snr_gamma")
    @classmethod
    def _gamma_is_positive(cls, gamma: float | str | None) -> float | str | None:
        if gamma not in ("auto", None) and (isinstance(gamma, str) or gamma <= 0):
            raise ValueError(f"must be a number above 0, auto or null, got {gamma!r}")
        return gamma

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "LossConfig":
        problems = []
        normal = self.timesteps in ("logit_normal", "log_snr")
        if self.timestep_bias and normal:
            problems.append(f"timestep_bias has no effect on timesteps {self.timesteps}: leave one of them out")
        for key in ("timestep_mean", "timestep_std"):
            if getattr(self, key) is not None and not normal:
                problems.append(f"{key} is of timesteps logit_normal or log_snr: set one of them, or leave it out")
        if self.delta is not None and self.type != "huber":
            problems.append(f"delta has no effect on type {self.type}: set type=huber, or leave it out")
        if self.weighting != "none" and self.min_snr_gamma not in ("auto", None):
            problems.append(f"weighting {self.weighting} and min_snr_gamma exclude each other: leave one of them out")
        return raise_problems(self, problems)

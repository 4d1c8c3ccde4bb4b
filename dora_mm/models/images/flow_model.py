"""Base class of flow models: the noise levels of training and sampling, prompts, and a transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

import dora_mm.models.chat_templates  # noqa: F401  bounds what models' files render
from dora_mm.config.paths import INDEX
from dora_mm.data.images.latents import Latents
from dora_mm.data.syntax import Wording
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.images.image_model import Distilled, ImageModel, Prompt
from dora_mm.models.images.noise import Flow, SchedulerFlow
from dora_mm.models.images.vae import posterior_of


class FlowModel(ImageModel):
    """An image model that predicts velocities.

    Its section has `max_tokens`. What is said here of text encoders, chat templates, sampling and latents is that of
    most families; the others say otherwise.
    """

    phases = (("tokenizer", "scheduler"), ("text_encoder",), ("vae",), ("transformer",))
    denoiser = "transformer"
    cell = 16  # 8 pixels per latent, two latents per token
    dtypes = ("float32", "bfloat16")
    reads_denoisers = True
    patch: ClassVar[int] = 2  # the side of what the transformer takes for one token, in its latents
    distilled_steps: ClassVar[int] = 0  # in which those generate whose index has `is_distilled`; 0: it says nothing
    # How the chat template of prompts is filled in; None: there is none
    chat: ClassVar[Mapping[str, Any] | None] = None
    scheduler_makes_levels: ClassVar[bool] = False  # whether its pipeline leaves noise levels to the scheduler
    # Whether its pipeline gives each token of a guided prediction the length that it has with the prompt alone
    rescales_guided_tokens: ClassVar[bool] = False
    trains_on_mode: ClassVar[bool] = True  # of the VAE's posterior; False: on samples of it

    @classmethod
    def distilled(cls, files: ModelFolder) -> Distilled | None:
        """The settings of a model with `is_distilled` in its pipeline's index, in families with `distilled_steps`."""
        if not (cls.distilled_steps and (files.index or {}).get("is_distilled")):
            return None
        return Distilled(cls.distilled_steps, 1.0, f"is_distilled in its {INDEX}")

    @property
    def resolution(self) -> int:
        return self.components.config("vae")["sample_size"]

    @property
    def vae_identity(self) -> str:
        return f"{super().vae_identity} mode" if self.trains_on_mode else super().vae_identity

    @cached_property
    def noise(self) -> Flow:
        return (SchedulerFlow if self.scheduler_makes_levels else Flow)(self.scheduler, self.patch)

    def prompt_length(self, prompt: Wording) -> int:
        """The same for all: they are filled up to one length, and the transformer reads what fills them."""
        return 1

    def num_tokens(self, prompt: str) -> int:
        if self.chat is None:
            return super().num_tokens(prompt)
        ids = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **self.chat)
        return len(ids["input_ids"])

    @property
    def most_tokens(self) -> int:
        return self.settings.max_tokens

    def encode_images(self, pixels: Tensor) -> Latents:
        posterior = posterior_of(self.vae, pixels)

        def one_frame(tensor: Tensor) -> Tensor:
            return (tensor.squeeze(2) if tensor.ndim > pixels.ndim else tensor).float()

        return Latents(one_frame(posterior.mode()), None if self.trains_on_mode else one_frame(posterior.logvar))

    @torch.no_grad()
    def encode_for_sampling(self, prompt: Wording, negative_prompt: Wording | None) -> Prompt:
        assert isinstance(prompt, str)  # it does not `weigh_words`
        assert not isinstance(negative_prompt, tuple)
        encoded, negative = self.encode_prompts([prompt, negative_prompt or ""])
        return {**encoded, **{f"negative_{name}": tensor for name, tensor in negative.items()}}

    @abstractmethod
    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """The arguments of the pipeline for prompts and guidance, which is 1 for none; see `pipeline_inputs`."""

    def pipeline_inputs(
        self, encoded: Sequence[Prompt], *, steps: int, guidance: float, width: int, height: int
    ) -> dict[str, Any]:
        levels = self.noise.schedule(steps, (height // self.downscale, width // self.downscale))
        return {**self.prompt_inputs(encoded, guidance), "sigmas": levels, "width": width, "height": height}

    @property
    def sampling_scheduler(self) -> Any:
        return self.noise.sampler()

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        kind = self.pipeline_class()
        _, options = kind._get_signature_keys(kind)
        known = {key: value for key, value in self.components.index.items() if key in options}  # such as is_distilled
        return super().make_pipeline({**known, **components, "scheduler": self.sampling_scheduler})

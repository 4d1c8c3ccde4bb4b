"""FLUX.2 [klein]: a transformer of two streams, Qwen3 as its text encoder, and Flux.2's VAE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from dora_mm.config.models import ModelConfig
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.flow_model import FlowModel
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.noise import Flow


class KleinFlow(Flow):
    """A shift that the authors fitted to the number of tokens and of steps.

    Args:
        scheduler: The model's scheduler.
        patch: As of `Flow`.
        steps: The number of steps in which the images will be generated that a training is for.
    """

    def __init__(self, scheduler: Any, patch: int, steps: int):
        super().__init__(scheduler, patch)
        self.steps = steps

    def mu(self, num_tokens: int, num_steps: int | None) -> float:
        return compute_empirical_mu(num_tokens, num_steps or self.steps)


class Flux2Klein(FlowModel):
    """FLUX.2 [klein] (Black Forest Labs, 2026): the base models, and those distilled to four steps.

    Its latents are patches of 2 x 2 of the VAE's, each of whose channels is normalised by what the VAE has counted.
    Prompts are filled up to one length, and the transformer reads what fills them.
    """

    name = "flux2_klein"
    vae_name = "AutoencoderKLFlux2"
    maps: ClassVar = {"transformer": "flux2"}
    distilled_steps = 4
    patch = 1  # its latents are patches already
    chat: ClassVar = {"add_generation_prompt": True, "enable_thinking": False}

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        channels = 4 * self.components.config("vae")["latent_channels"]
        expected = self.components.config("transformer")["in_channels"]
        if channels != expected:
            raise ValueError(
                f"model.path: {config.path}: its VAE gives {channels} channels, its transformer has {expected}."
            )

    @property
    def downscale(self) -> int:
        return 2 * self.vae_downscale

    @cached_property
    def noise(self) -> Flow:
        return KleinFlow(self.scheduler, self.patch, self.settings.shift_steps)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """One by one, so that none depends on the others in the last bits."""
        settings: dict[str, Any] = {"max_sequence_length": self.settings.max_tokens}
        settings["device"] = get_module_execution_device(self.text_encoder)
        encode = self.pipeline_class()._get_qwen3_prompt_embeds
        return [{"text": encode(self.text_encoder, self.tokenizer, prompt, **settings)[0]} for prompt in prompts]

    def normalized(self, latents: Tensor) -> Tensor:
        patches = self.pipeline_class()._patchify_latents(latents)
        mean, variance = (t.view(1, -1, 1, 1).to(patches) for t in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return (patches - mean) / (variance + self.vae.config.batch_norm_eps).sqrt()

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        network, pipeline = self.transformer, self.pipeline_class()
        text = torch.stack([prompt["text"] for prompt in prompts]).to(network.dtype)
        found = network(
            hidden_states=pipeline._pack_latents(noised.to(network.dtype)),
            timestep=time,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text).to(noised.device),
            img_ids=pipeline._prepare_latent_ids(noised).to(noised.device),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).reshape(noised.shape)

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        return {
            "prompt_embeds": torch.stack([each["text"] for each in encoded]),
            "negative_prompt_embeds": torch.stack([each["negative_text"] for each in encoded]),
            "guidance_scale": guidance,
        }

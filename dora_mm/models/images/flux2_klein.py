"""FLUX.2 [klein]: a transformer of two streams, Qwen3 as its text encoder, and Flux.2's VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from dora_mm.config.models import ModelConfig
from dora_mm.data.images.buckets import Framing, Size
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.noise import Flow

REFERENCE_AREA = 1024 * 1024  # pixels: larger references are scaled down to it by the pipeline


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


class Flux2Klein(EditingModel):
    """FLUX.2 [klein] (Black Forest Labs, 2026): the base models, and those distilled to four steps.

    Its latents are patches of 2 x 2 of the VAE's, each of whose channels is normalised by what the VAE has counted.
    Prompts are filled up to one length, and the transformer reads what fills them. References follow the noised tokens,
    each at a time of its own.
    """

    name = "flux2_klein"
    vae_name = "AutoencoderKLFlux2"
    maps: ClassVar = {"transformer": "flux2"}
    distilled_steps = 4
    patch = 1  # its latents are patches already
    chat: ClassVar = {"add_generation_prompt": True, "enable_thinking": False}
    smallest_reference = 64
    longest_reference = 8.0

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

    def reference_size(self, size: Size, area: int | None = None) -> Size:
        height, width = _within(self.prepared_size(size, area), REFERENCE_AREA)
        return height // self.downscale * self.downscale, width // self.downscale * self.downscale

    def prepared_size(self, size: Size, area: int | None = None) -> Size:
        return _within(size, area)

    def scaled_reference(self, image: Image.Image, area: int) -> Image.Image:
        return Flux2ImageProcessor._resize_if_exceeds_area(image, area)

    def reference_pixels(self, image: Image.Image) -> Tensor:
        image = Flux2ImageProcessor._resize_if_exceeds_area(image, REFERENCE_AREA)
        height, width = self.reference_size((image.height, image.width))
        processor = Flux2ImageProcessor(vae_scale_factor=self.downscale)
        return processor.preprocess(image, height=height, width=width, resize_mode="crop")

    def edited_size(self, references: Sequence[Size]) -> Size:
        return self.reference_size(references[0])

    def predict_edit(
        self,
        noised: Tensor,
        time: Tensor,
        prompts: Sequence[Prompt],
        framings: Sequence[Framing],
        references: Sequence[Tensor],
    ) -> Tensor:
        network, pipeline = self.transformer, self.pipeline_class()
        text = torch.stack([prompt["text"] for prompt in prompts]).to(network.dtype)
        tokens = [pipeline._pack_latents(latents.to(network.dtype)) for latents in (noised, *references)]
        positions = pipeline._prepare_latent_ids(noised)
        if references:  # whose positions are the same for all rows
            ids = pipeline._prepare_image_ids([latents[:1] for latents in references])
            positions = torch.cat([positions, ids.expand(len(noised), -1, -1)], dim=1)
        found = network(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=time,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text).to(noised.device),
            img_ids=positions.to(noised.device),
            return_dict=False,
        )[0]
        return found[:, : tokens[0].shape[1]].transpose(1, 2).reshape(noised.shape)

    def prompt_inputs(self, encoded: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        return {
            "prompt_embeds": torch.stack([each["text"] for each in encoded]),
            "negative_prompt_embeds": torch.stack([each["negative_text"] for each in encoded]),
            "guidance_scale": guidance,
        }


def _within(size: Size, area: int | None) -> Size:
    """The size of an image after `Flux2ImageProcessor._resize_if_exceeds_area`."""
    height, width = size
    if area is None or height * width <= area:
        return size
    scale = math.sqrt(area / (width * height))
    return int(height * scale), int(width * scale)

"""SDXL: a UNet with two text encoders, conditioned on the sizes and the crop of the training images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.latents import Latents
from dora_mm.data.syntax import Wording
from dora_mm.models.images.image_model import ImageModel, Prompt, SingleFile, pad_prompts
from dora_mm.models.images.noise import Diffusion
from dora_mm.models.images.sdxl import checkpoint, encoding


class SDXL(ImageModel):
    """Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952)."""

    name = "sdxl"
    phases = (("tokenizer", "tokenizer_2", "scheduler"), ("text_encoder", "text_encoder_2"), ("vae",), ("unet",))
    denoiser = "unet"
    maps: ClassVar = {"unet": "sdxl-unet", "text_encoder": "clip-text", "text_encoder_2": "clip-text"}
    cell, weighs_words, rescales_guidance = 8, True, True
    token_tables: ClassVar = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    predictions = ("epsilon", "v_prediction")
    single_file = SingleFile(checkpoint.CONFIGS, checkpoint.tokenizers, checkpoint.scheduler_settings)

    @property
    def resolution(self) -> int:
        return self.components.config("unet")["sample_size"] * self.downscale

    @cached_property
    def noise(self) -> Diffusion:
        return Diffusion(self.scheduler)

    @property
    def unconditional(self) -> str:
        return self.settings.unconditional

    def prompt_length(self, prompt: Wording) -> int:
        """The number of chunks of the text encoders' length."""
        return encoding.num_chunks(self, prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encodes prompts; those with equally many chunks form a batch, so that none is padded."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[self.prompt_length(prompt)].append(index)
        found: dict[int, Prompt] = {}
        for group in groups.values():
            encoded = zip(*encoding.encode_prompts(self, [prompts[index] for index in group]), strict=True)
            found |= {index: {"text": text, "pooled": p} for index, (text, p) in zip(group, encoded, strict=True)}
        return [found[index] for index in range(len(prompts))]

    def encode_images(self, pixels: Tensor) -> Latents:
        return Latents(*encoding.encode_images(self, pixels))

    def normalized(self, latents: Tensor) -> Tensor:
        return encoding.normalize_latents(self.vae, latents)

    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        text, mask = pad_prompts(prompts, "text")
        sizes = [encoding.time_ids(f.original_size, f.crop_top_left, f.target_size) for f in framings]
        pooled = torch.stack([prompt["pooled"] for prompt in prompts])
        return self.unet(
            noised,
            time,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.stack(sizes).to(noised.device)},
        ).sample

    def encode_for_sampling(self, prompt: Wording, negative_prompt: Wording | None) -> Prompt:
        return encoding.encode_for_pipeline(self, prompt, negative_prompt)

    def pipeline_inputs(
        self, encoded: Sequence[Prompt], *, steps: int, guidance: float, width: int, height: int
    ) -> dict[str, Any]:
        embeddings = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "width": width, "height": height}
        return {**embeddings, **settings}

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        # as SDXL base sets the first, and without a watermark
        return self.pipeline_class()(**components, force_zeros_for_empty_prompt=True, add_watermarker=False)

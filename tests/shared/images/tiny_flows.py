"""Tiny models of the families that predict velocities, and what plain diffusers makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    Krea2Pipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from dora_mm.registries.image_families import IMAGE_FAMILIES
from tests.shared.images import tiny_flux2_klein as klein
from tests.shared.images import tiny_krea2 as krea2
from tests.shared.images import tiny_qwen_image as qwen_image
from tests.shared.images import tiny_qwen_image_21 as qwen_image_21
from tests.shared.images import tiny_sd3 as sd3
from tests.shared.images import tiny_z_image as z_image

PROMPT = "a TOK icon of a red ball"
SIZE = {"height": 64, "width": 64}


@dataclass(frozen=True)
class TinyFlow:
    """A tiny model with random weights.

    Attributes:
        name: Its family.
        build: Saves it as a folder of diffusers, also one that was distilled, with the same weights.
        distilled: The steps of what is distilled of it, and what its files say of that; None: nothing is.
        kind: Its pipeline of diffusers.
        embeddings: The embeddings (L, ...) that a pipeline makes of prompts.
        unguided: The arguments of the pipeline for prompts, without guidance.
        guided: Those for a prompt with guidance 5, in our count.
        as_denoised: The latents that the pipeline's VAE gives, as the denoiser has them.
        is_over_frames: Whether its VAE is one of videos.
        unread: A regular expression for the layers that no gradient reaches: docs/targets.md.
        settings: The family's section in the trainings of tests.
    """

    name: str
    build: Callable[..., Path]
    distilled: tuple[int, str] | None
    kind: Any
    embeddings: Callable[[Any, list[str]], list[Tensor]]
    unguided: Callable[[Any, list[str]], dict[str, Any]]
    guided: Callable[[str], dict[str, Any]]
    as_denoised: Callable[[Any, Tensor], Tensor]
    is_over_frames: bool = False
    unread: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return IMAGE_FAMILIES[self.name].title

    def plain(self, folder: Path, **settings: Any) -> Any:
        """The model in plain diffusers."""
        pipe = self.kind.from_pretrained(folder, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def latents(self, pipe: Any, prompts: list[str], seeds: list[int], steps: int) -> Tensor:
        """What the pipeline has after these steps without guidance, as the denoiser has it."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": steps, "generator": generators, "output_type": "latent", **SIZE}
        return self.as_noised(pipe(**self.unguided(pipe, prompts), **settings).images, pipe)

    def as_noised(self, latents: Tensor, pipe: Any) -> Tensor:
        """The latents that the pipeline returns, as its denoiser has them."""
        if self.kind in (QwenImagePipeline, QwenImage21Pipeline):
            return pipe._unpack_latents(latents, *SIZE.values(), pipe.vae_scale_factor)[:, :, 0]
        if self.kind is Krea2Pipeline:
            return pipe._unpack_latents(latents, *SIZE.values())[:, :, 0]
        return self.as_denoised(pipe, latents) if self.kind is Flux2KleinPipeline else latents

    def start(self, shape: tuple[int, ...], seeds: list[int]) -> Tensor:
        """The noise (B, C, h, w) that the pipeline draws."""
        b, *rest = shape
        shape = (b, 1, *rest) if self.kind in (QwenImagePipeline, QwenImage21Pipeline) else shape
        return randn_tensor(shape, generator=[torch.Generator().manual_seed(seed) for seed in seeds]).view(b, *rest)

    def drawn(self, pipe: Any, seed: int, steps: int = 2) -> Image.Image:
        """The image of the prompt, with guidance 5."""
        settings = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **SIZE}
        return pipe(**self.guided(PROMPT), **settings).images[0]


def _patches(pipe: Any, latents: Tensor) -> Tensor:
    """The 2 x 2 patches of latents, normalised by the VAE's own batch norm."""
    return pipe.vae.bn(torch.nn.functional.pixel_unshuffle(latents, 2))


def _of_z_image(pipe: Any, prompts: list[str]) -> list[Tensor]:
    return pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]


def _of_qwen_image(pipe: Any, prompts: list[str]) -> list[Tensor]:
    return [pipe.encode_prompt(prompt)[0][0] for prompt in prompts]


def _of_krea2(pipe: Any, prompts: list[str]) -> list[Tensor]:
    """As the pipeline has them, filled up, without what fills them up."""
    text, mask = pipe.encode_prompt(list(prompts))
    return [row[kept] for row, kept in zip(text, mask, strict=True)]


def _by_channel(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1) for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return (latents - mean) / std


FLOWS = (
    TinyFlow(
        "z_image",
        z_image.build,
        (8, "the shift of its scheduler, 3"),
        ZImagePipeline,
        _of_z_image,
        lambda pipe, prompts: {
            "prompt_embeds": _of_z_image(pipe, prompts),
            "negative_prompt_embeds": [],
            "guidance_scale": 0.0,
        },
        lambda prompt: {"prompt": prompt, "negative_prompt": "", "guidance_scale": 4.0},
        lambda pipe, latents: (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
    ),
    TinyFlow(
        "flux2_klein",
        klein.build,
        (4, "is_distilled in its model_index.json"),
        Flux2KleinPipeline,
        lambda pipe, prompts: list(pipe.encode_prompt(list(prompts), max_sequence_length=64)[0]),
        lambda pipe, prompts: {"prompt": list(prompts), "guidance_scale": 1.0, "max_sequence_length": 64},
        lambda prompt: {"prompt": prompt, "guidance_scale": 5.0, "max_sequence_length": 64},
        _patches,
        settings={"max_tokens": 64},
    ),
    TinyFlow(
        "qwen_image",
        qwen_image.build,
        None,
        QwenImagePipeline,
        _of_qwen_image,
        lambda pipe, prompts: {"prompt": list(prompts), "true_cfg_scale": 1.0},
        lambda prompt: {"prompt": prompt, "negative_prompt": "", "true_cfg_scale": 5.0},
        _by_channel,
        is_over_frames=True,
        unread=r"transformer_blocks\.1\.(attn\.(add_q|to_add_out)|txt_mlp)",
    ),
    TinyFlow(
        "qwen_image_21",
        qwen_image_21.build,
        None,
        QwenImage21Pipeline,
        _of_qwen_image,
        lambda pipe, prompts: {"prompt": list(prompts), "use_kv_cache": False},
        lambda prompt: {"prompt": prompt, "negative_prompt": "", "true_cfg_scale": 5.0},
        _by_channel,
        is_over_frames=True,
    ),
    TinyFlow(
        "krea2",
        krea2.build,
        (8, "is_distilled in its model_index.json"),
        Krea2Pipeline,
        _of_krea2,
        lambda pipe, prompts: {"prompt": list(prompts), "guidance_scale": 0.0},
        lambda prompt: {"prompt": prompt, "negative_prompt": "", "guidance_scale": 4.0},
        _by_channel,
        is_over_frames=True,
    ),
    TinyFlow(
        "sd3",
        sd3.build,
        None,
        StableDiffusion3Pipeline,
        lambda pipe, prompts: list(pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)[0]),
        lambda pipe, prompts: {"prompt": list(prompts), "guidance_scale": 1.0},
        lambda prompt: {"prompt": prompt, "negative_prompt": "", "guidance_scale": 5.0},
        lambda pipe, latents: (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
        unread=r"transformer_blocks\.1\.attn\.add_q",
    ),
)
NAMES = [flow.name for flow in FLOWS]
FAST = "flux2_klein"  # the one that everything is tried on in plain `make test`; the others are slow
EACH = [flow if flow.name == FAST else pytest.param(flow, marks=pytest.mark.slow) for flow in FLOWS]

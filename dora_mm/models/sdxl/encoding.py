"""What SDXL is conditioned on, and its latents: prompts, sizes and pictures, encoded. No other file does this."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from dora_mm.models.sdxl.loading import SDXL, config_of


def tokenize(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) for either encoder, each padded in its own way; L is the tokenizer's length, 77 in SDXL."""
    one, two = (
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (model.tokenizer, model.tokenizer_2)
    )
    return one, two


def truncated_prompts(model: SDXL, prompts: Sequence[str]) -> dict[str, int]:
    """The prompts that do not fit the text encoders, with their numbers of tokens; what is too much is cut off."""
    counts = {prompt: len(model.tokenizer(prompt).input_ids) for prompt in prompts}
    return {prompt: count for prompt, count in counts.items() if count > model.tokenizer.model_max_length}


def encode_tokens(model: SDXL, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (B, L, D1 + D2) and pooled embedding (B, P).

    The embeddings are both encoders' penultimate hidden states side by side; the pooled one is encoder 2's alone.
    """
    one = model.text_encoder(ids.to(model.device), output_hidden_states=True)
    two = model.text_encoder_2(ids_2.to(model.device), output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def encode_prompts(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_tokens`, from text."""
    return encode_tokens(model, *tokenize(model, prompts))


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> torch.Tensor:
    """Micro-conditioning (6,): (h, w) before resizing, the crop's corner in the resized picture, the target."""
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)


@torch.no_grad()
def encode_images(model: SDXL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (B, C, h, w), float32, of the VAE's posterior for pixels (B, 3, H, W) in [-1, 1].

    SDXL's own VAE overflows in fp16 and says so in its config (`force_upcast`); it then runs in float32. Autocast would
    undo that, so it is off in here.
    """
    vae: Any = model.vae  # diffusers annotates its results as tuples
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.float()
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    if upcast:
        vae.to(dtype)
    return posterior.mean.float(), posterior.logvar.float()


def draw_latents(
    vae: AutoencoderKL, mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """A sample of the posterior in the units that the UNet works in; its mean without a generator."""
    latents = mean
    if generator is not None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    return normalize_latents(vae, latents)


def normalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) * scaling_factor / std, where the VAE's config gives mean and std per channel."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    return latents * config_of(vae).scaling_factor


def denormalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The inverse: what the VAE decodes."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    latents = latents / config_of(vae).scaling_factor
    return latents * std + mean if mean is not None and std is not None else latents


def _per_channel(vae: AutoencoderKL, name: str, like: torch.Tensor) -> torch.Tensor | None:
    values: Any = getattr(vae.config, name, None)
    return None if values is None else torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

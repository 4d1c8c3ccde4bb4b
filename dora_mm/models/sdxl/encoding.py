"""Encodes what SDXL reads: prompts, sizes (micro-conditioning) and images. No other file does this."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from dora_mm.models.sdxl.loading import SDXL, config_of


def tokenize(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizes prompts for both text encoders; the two tokenizers pad differently.

    Args:
        model: The model whose tokenizers are used.
        prompts: B prompts; what does not fit is truncated (see `truncated_prompts`).

    Returns:
        Token ids (B, L) for text encoder 1 and for text encoder 2; L is the tokenizer's maximum length, 77 in SDXL.
    """
    ids, ids_2 = (
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (model.tokenizer, model.tokenizer_2)
    )
    return ids, ids_2


def truncated_prompts(model: SDXL, prompts: Sequence[str]) -> dict[str, int]:
    """Maps each prompt that is too long for the text encoders, and so will be truncated, to its number of tokens."""
    counts = {prompt: len(model.tokenizer(prompt).input_ids) for prompt in prompts}
    return {prompt: count for prompt, count in counts.items() if count > model.tokenizer.model_max_length}


def encode_tokens(model: SDXL, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes token ids with both text encoders.

    Args:
        model: The model whose text encoders are used.
        ids: Token ids for text encoder 1 (B, L).
        ids_2: Token ids for text encoder 2 (B, L).

    Returns:
        The prompt embeddings (B, L, D1 + D2), which are the penultimate hidden states of both encoders concatenated,
        and the pooled embedding (B, P), which is that of encoder 2 alone.
    """
    output = model.text_encoder(ids.to(model.device), output_hidden_states=True)
    output_2 = model.text_encoder_2(ids_2.to(model.device), output_hidden_states=True)
    return torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], dim=-1), output_2.text_embeds


def encode_prompts(model: SDXL, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenizes and encodes prompts; returns what `encode_tokens` returns."""
    return encode_tokens(model, *tokenize(model, prompts))


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> torch.Tensor:
    """SDXL's micro-conditioning of one image.

    Args:
        original_size: Height and width of the image before resizing, in pixels.
        crop_top_left: Top and left of the crop within the resized image, in pixels.
        target_size: Height and width of the crop, in pixels.

    Returns:
        The six numbers in this order (6,), float32.
    """
    return torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)


@torch.no_grad()
def encode_images(model: SDXL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE's posterior for a batch of images.

    SDXL's own VAE overflows in fp16 and declares it in its config (`force_upcast`); it then runs in float32. Autocast
    would undo that, so it is disabled here.

    Args:
        model: The model whose VAE encodes.
        pixels: Images (B, 3, H, W) in [-1, 1].

    Returns:
        Mean and log-variance (B, C, h, w), float32.
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
    """Draws latents from the VAE's posterior, normalized as the UNet expects them.

    Args:
        vae: Its config holds the normalization.
        mean: Mean of the posterior (B, C, h, w), as `encode_images` returns it.
        logvar: Log-variance of the posterior (B, C, h, w).
        generator: Source of the noise; None returns the (normalized) mean.

    Returns:
        Latents (B, C, h, w).
    """
    latents = mean
    if generator is not None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    return normalize_latents(vae, latents)


def normalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) * scaling_factor / std; mean and std only where the VAE's config has them, per channel."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    return latents * config_of(vae).scaling_factor


def denormalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalize_latents`: the UNet's latents as the VAE decodes them."""
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    latents = latents / config_of(vae).scaling_factor
    return latents * std + mean if mean is not None and std is not None else latents


def _per_channel(vae: AutoencoderKL, name: str, like: torch.Tensor) -> torch.Tensor | None:
    values: Any = getattr(vae.config, name, None)
    return None if values is None else torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

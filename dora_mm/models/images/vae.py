"""The VAE of an image model: its posterior of images, and the images of latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor, nn

from dora_mm.core.functional import without_autocast


@torch.no_grad()
def posterior_of(vae: Any, pixels: Tensor) -> Any:
    """The Gaussian that the VAE predicts for images (B, 3 or 4, H, W) in [-1, 1]; those without alpha are opaque."""
    if pixels.shape[1] == 3 and vae.encoder.conv_in.in_channels == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    with _in_its_precision(vae):
        return vae.encode(_as_frames(vae, pixels.to(get_module_execution_device(vae), vae.dtype))).latent_dist


def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """The pixels (B, 3 or 4, H, W) of latents (B, C, h, w), both as the VAE has them."""
    pixels = vae.decode(_as_frames(vae, latents)).sample
    return pixels.squeeze(2) if pixels.ndim > latents.ndim else pixels


def _as_frames(vae: Any, x: Tensor) -> Tensor:
    """Pixels or latents (B, C, h, w) as the VAE takes them: one of videos takes one frame (B, C, 1, h, w)."""
    is_over_frames = isinstance(vae.encoder.conv_in, nn.Conv3d) or "temperal_downsample" in vae.config
    return x.unsqueeze(2) if is_over_frames else x


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> list[Image.Image]:
    """The images of latents (B, C, h, w) that are as the VAE gives them, not as the denoiser expects them."""
    with _in_its_precision(vae):
        pixels = pixels_of(vae, latents.to(get_module_execution_device(vae), vae.dtype)).float()
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


@contextmanager
def _in_its_precision(vae: Any) -> Iterator[None]:
    """A context in which the VAE computes in float32 where it overflows in float16, which its config declares.

    (`force_upcast`, which not every class has.) So it does where its weights are in bfloat16: in that alone the mean is
    off by twice as much, 0.41 instead of 0.20 of the posterior's deviation (16 images of bricks at 128 px). Autocast
    would undo it: it is off.
    """
    dtype = vae.dtype
    upcast = dtype.itemsize < 4 and vae.config.get("force_upcast", True)
    if upcast:
        vae.float()
    try:
        with without_autocast(vae.device):
            yield
    finally:
        if upcast:
            nn.Module.to(vae, dtype)  # diffusers' own warns each time

"""The losses of a small VAE on flat pictures."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dora_mm.models.sdxl.encoding import denormalize_latents
from dora_mm.tasks.sdxl import ConditionedLatents, DiffusionTask

# Only keeps the posterior from collapsing to a point at infinity; the latents are normalised by their statistics later.
KL_WEIGHT = 1e-6


class ReconstructionTask:
    """Pixels against their reconstruction (see `pixel_loss`).

    Colour needs help. With L1 on pixels and edges alone, encoder and decoder agreed on shapes in grey, and since
    neither gains from colour before the other knows it, they stayed there for 3,000 steps. So the first three latent
    channels are pulled towards the mean colour of their cell, and errors of the mean colour count several times.
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae: Any = vae  # annotated as returning tuples

    def loss(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """For pixels (B, 3, H, W) in [-1, 1]."""
        encode, decode = self.vae.encode, self.vae.decode
        posterior = encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device)
        decoded = decode(posterior.mean + posterior.std * noise.to(posterior.mean)).sample.float()
        cell = pixels.shape[-1] // posterior.mean.shape[-1]
        return (
            pixel_loss(decoded, pixels, cell)
            + F.mse_loss(posterior.mean[:, :3].float(), F.avg_pool2d(pixels, cell))
            + KL_WEIGHT * posterior.kl().float().mean()
        )


class DecodingTask:
    """Pixels against what the decoder makes of their latents after the UNet has noised and predicted them.

    A small UNet leaves errors in the latents that it draws. They are small (a tenth of the latents' spread) and smooth,
    and a decoder that has only seen the encoder's own latents shows them as stains on what should be even.
    """

    def __init__(self, vae: AutoencoderKL, diffusion: DiffusionTask, max_time: int):
        """max_time: up to which time latents are noised; the later, the more errors are left."""
        self.vae: Any = vae
        self.diffusion, self.max_time = diffusion, max_time

    def loss(self, batch: tuple[torch.Tensor, ConditionedLatents], generator: torch.Generator) -> torch.Tensor:
        """For pixels (B, 3, H, W) in [-1, 1] and their latents."""
        pixels, conditioned = batch
        times = torch.randint(self.max_time, (len(pixels),), generator=generator, device=generator.device)
        with torch.no_grad():
            latents = self.diffusion.denoised(conditioned, times.to(pixels.device), generator)
        decoded = self.vae.decode(denormalize_latents(self.vae, latents)).sample.float()
        return pixel_loss(decoded, pixels, pixels.shape[-1] // latents.shape[-1])


def pixel_loss(decoded: torch.Tensor, pixels: torch.Tensor, cell: int) -> torch.Tensor:
    """L1 on pixels, on differences to the neighbours (edges, which icons consist of) and on the means of cells; MSE."""
    return (
        F.l1_loss(decoded, pixels)
        + 0.5 * F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2))
        + 0.5 * F.l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
        + 4 * F.mse_loss(decoded, pixels)
        + 4 * F.l1_loss(F.avg_pool2d(decoded, cell), F.avg_pool2d(pixels, cell))
    )


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(decoded.float().clamp(-1, 1), pixels.float())))

"""The loss of a small VAE on flat pictures."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

# Only keeps the posterior from collapsing to a point at infinity; the latents are normalised by their statistics later.
KL_WEIGHT = 1e-6


class ReconstructionTask:
    """L1 on pixels, on their differences to the neighbours (edges, which icons consist of) and on the means of cells.

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
        colour = F.avg_pool2d(pixels, pixels.shape[-1] // posterior.mean.shape[-1])
        return (
            F.l1_loss(decoded, pixels)
            + 0.5 * F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2))
            + 0.5 * F.l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
            + 4 * F.mse_loss(decoded, pixels)
            + 4 * F.l1_loss(F.adaptive_avg_pool2d(decoded, (colour.shape[-2], colour.shape[-1])), colour)
            + F.mse_loss(posterior.mean[:, :3].float(), colour)
            + KL_WEIGHT * posterior.kl().float().mean()
        )


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(decoded.float().clamp(-1, 1), pixels.float())))

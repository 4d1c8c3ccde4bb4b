"""The loss of a small VAE on flat pictures."""

import torch
import torch.nn.functional as F
from torch import nn

# Only keeps the posterior from collapsing to a point at infinity; the latents are normalised by their statistics later.
KL_WEIGHT = 1e-6


class ReconstructionTask:
    """L1 on pixels plus L1 on their differences to the neighbours: edges, which icons consist of, count twice."""

    def __init__(self, vae: nn.Module):
        self.vae = vae

    def loss(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """For pixels (B, 3, H, W) in [-1, 1]."""
        encode, decode = self.vae.encode, self.vae.decode
        posterior = encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device)
        decoded = decode(posterior.mean + posterior.std * noise.to(posterior.mean)).sample.float()
        return (
            F.l1_loss(decoded, pixels)
            + F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2))
            + F.l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
            + KL_WEIGHT * posterior.kl().float().mean()
        )


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(decoded.float().clamp(-1, 1), pixels.float())))

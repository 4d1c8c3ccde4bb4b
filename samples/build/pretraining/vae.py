"""The losses that train a small VAE on flat images, and the scale of its latents."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dora_mm.models.images.sdxl.encoding import denormalize_latents
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask

# Only keeps the posterior from collapsing to a point at infinity; the latents are normalised after the training.
KL_WEIGHT = 1e-6


class ReconstructionTask:
    """The reconstruction loss of a VAE (see `pixel_loss`).

    Colour needs extra terms. With only L1 on pixels and edges, encoder and decoder agreed on shapes in grey, and since
    neither gains from colour before the other uses it, they stayed there for 3,000 steps. So the first three latent
    channels are pulled towards the mean colour of their cell, and errors of the mean colour count several times.

    Args:
        vae: The VAE.
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae: Any = vae  # annotated as returning tuples

    def loss(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            generator: For the noise of the latents.
        """
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
    """The reconstruction loss of a VAE's decoder on latents that are noised and then denoised by the UNet.

    The latents that a small UNet generates have errors. They are small (a tenth of the latents' standard deviation) and
    smooth, and a decoder trained only on the encoder's latents turns them into stains on even areas.

    Args:
        vae: The VAE.
        diffusion: Noises and denoises the latents with the UNet.
        max_time: The latents are noised to timesteps below this; the higher, the more errors remain.
    """

    def __init__(self, vae: AutoencoderKL, diffusion: DiffusionTask, max_time: int):
        self.vae: Any = vae
        self.diffusion, self.max_time = diffusion, max_time

    def loss(self, batch: tuple[torch.Tensor, ConditionedLatents], generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch.

        Args:
            batch: Pixels (B, 3, H, W) in [-1, 1], and their latents with the UNet's conditioning.
            generator: For timesteps and noise.
        """
        pixels, conditioned = batch
        times = torch.randint(self.max_time, (len(pixels),), generator=generator, device=generator.device)
        with torch.no_grad():
            latents = self.diffusion.denoised(conditioned, times.to(pixels.device), generator)
        decoded = self.vae.decode(denormalize_latents(self.vae, latents)).sample.float()
        return pixel_loss(decoded, pixels, pixels.shape[-1] // latents.shape[-1])


def pixel_loss(decoded: torch.Tensor, pixels: torch.Tensor, cell: int) -> torch.Tensor:
    """L1 on pixels, on differences between neighbours (the edges of icons) and on the means of cells, plus MSE.

    Args:
        decoded: The reconstruction, (B, 3, H, W).
        pixels: The original, (B, 3, H, W) in [-1, 1].
        cell: Side of a cell in pixels: the patch that is encoded as one latent.
    """
    return (
        F.l1_loss(decoded, pixels)
        + 0.5 * F.l1_loss(decoded.diff(dim=2), pixels.diff(dim=2))
        + 0.5 * F.l1_loss(decoded.diff(dim=3), pixels.diff(dim=3))
        + 4 * F.mse_loss(decoded, pixels)
        + 4 * F.l1_loss(F.avg_pool2d(decoded, cell), F.avg_pool2d(pixels, cell))
    )


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """The peak signal-to-noise ratio, in dB, of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(decoded.float().clamp(-1, 1), pixels.float())))


@torch.no_grad()
def shift_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Changes the VAE's weights so that its latents become (z - mean) / std, per channel.

    Reconstructions stay the same. diffusers' config keys for this (`latents_mean`) assume four channels.

    Args:
        vae: The VAE, changed in place.
        mean: Mean of the latents, (C,).
        std: Standard deviation of the latents, (C,).
    """
    channels = len(mean)
    encode: Any = vae.quant_conv  # 1 x 1 convolutions next to the latents
    decode: Any = vae.post_quant_conv
    encode.bias[:channels] -= mean
    encode.weight[:channels] /= std.view(-1, 1, 1, 1)
    encode.bias[:channels] /= std
    encode.bias[channels:] -= 2 * std.log()  # the second half are log-variances
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)

"""The VAE computes in float32 where half precision overflows or loses digits, and is as before afterwards."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dora_mm.models.images.vae import decoded, posterior_of


def vae_in(dtype, **config):
    """A VAE with random weights on the grid of a dtype."""
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_in_half_precision_compute_in_float32(dtype, autocast):
    vae, pixels = vae_in(dtype), torch.rand(1, 3, 16, 16) * 2 - 1
    single = deepcopy(vae).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        posterior = posterior_of(vae, pixels.to(dtype).float())
        (image,) = decoded(vae, posterior.mean)
    expected = single.encode(pixels.to(dtype).float()).latent_dist.mean
    assert posterior.mean.dtype == torch.float32
    levels = (single.decode(expected).sample.detach() / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255
    assert np.abs(np.asarray(image) - levels.numpy()).max() <= 1
    torch.testing.assert_close(posterior.mean, expected)
    assert vae.dtype == dtype


def test_values_beyond_float16_are_numbers():
    vae = vae_in(torch.float16)
    vae.encoder.conv_in.weight.data.mul_(3e4)  # a normalization follows in each block: the sums overflow, not the end
    vae.encoder.conv_in.bias.data.fill_(6e4)
    assert posterior_of(vae, torch.ones(1, 3, 16, 16)).mean.isfinite().all()


def test_a_vae_that_declares_it_needs_none_stays_in_its_dtype():
    vae = vae_in(torch.bfloat16, force_upcast=False)
    assert posterior_of(vae, torch.zeros(1, 3, 16, 16)).mean.dtype == torch.bfloat16


def test_an_error_leaves_the_vae_in_its_dtype():
    vae = vae_in(torch.bfloat16)
    with pytest.raises(RuntimeError):
        posterior_of(vae, torch.zeros(1, 5, 16, 16))
    assert vae.dtype == torch.bfloat16

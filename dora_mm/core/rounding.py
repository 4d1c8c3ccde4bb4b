"""Stochastic rounding of merged weights, and the generator of a layer's random numbers."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seeded_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends only on the seed and the path of the module, not on the order of the layers."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def round_stochastically(W: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds each entry of W to `dtype`, up or down, with the probabilities that preserve its expectation.

    Entries that `dtype` represents exactly stay. Rounding to nearest would drop every update below half a unit in the
    last place.

    Args:
        W: Any shape, in fp32.
        dtype: The dtype of the result, of half precision.
        generator: A CPU generator.
    """
    info = torch.finfo(dtype)
    power = (W.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two at or below |W|
    unit = power.clamp_(min=info.smallest_normal).mul_(info.eps)
    quotient = W / unit  # exact, as is what follows
    lower = quotient.floor()
    noise = torch.rand(W.shape, generator=generator, dtype=torch.float32, device="cpu").to(W.device)
    lower += noise < quotient.sub_(lower)
    return lower.mul_(unit).clamp_(info.min, info.max).to(dtype)


def shares(merged: Tensor, W: Tensor, W0: Tensor) -> tuple[float, float]:
    """Returns <merged - W0, W - W0> and <W - W0, W - W0>."""
    update, stored = W - W0, merged.to(W.dtype) - W0
    return (stored * update).sum(dtype=torch.float64).item(), (update * update).sum(dtype=torch.float64).item()

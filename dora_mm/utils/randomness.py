"""Randomness as a function of (seed, step, purpose): no generator state to save or restore, resuming is exact."""

import hashlib

import torch


def generator(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends only on `seed`, `step` and `purpose`.

    Args:
        seed: The seed of the run.
        step: The training step, epoch or item number that the values are for.
        purpose: What the values are used for. Independent uses, and different processes, need different purposes.
        device: Where the generator lives; the same arguments give other values on another kind of device.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

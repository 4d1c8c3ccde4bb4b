"""Randomness as a function of (seed, step, purpose): nothing to save, nothing to restore, resuming is exact."""

import hashlib
from collections.abc import Sequence

import torch


def generator(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the three arguments alone. Other processes, other `purpose`s."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The items of batch `step`: consecutive pieces of one endless sequence of seeded permutations of all items.

    Every item is seen once per epoch, and a batch may straddle two epochs, so that no item is ever dropped.

    Raises:
        ValueError: there are no items.
    """
    if num_items < 1:
        raise ValueError("There is nothing to train on: the data set holds no items.")
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // num_items for position in positions}
    orders = {epoch: _epoch_order(num_items, epoch, seed) for epoch in epochs}
    return [orders[position // num_items][position % num_items] for position in positions]


def _epoch_order(num_items: int, epoch: int, seed: int) -> Sequence[int]:
    return torch.randperm(num_items, generator=generator(seed, epoch, "data order")).tolist()

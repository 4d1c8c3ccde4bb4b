"""Randomness as a function of (seed, step, purpose): no generator state to save or restore, resuming is exact."""

import hashlib
from collections.abc import Sequence

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


def batch_of_groups(groups: Sequence[Sequence[int]], batch_size: int, number: int, seed: int) -> list[int]:
    """The item indices of batch `number` where only items of one group may share a batch (images of one size).

    An epoch contains every item once, in batches of `batch_size`, the last batch of a group possibly smaller. In every
    epoch the items are reshuffled within their group, and then the batches among each other.

    Args:
        groups: The item indices of each group.
        batch_size: Items per batch.
        number: Number of the batch, from 0, counted across epochs.
        seed: The seed of the run.

    Raises:
        ValueError: There are no items.
    """
    counts = [-(-len(group) // batch_size) for group in groups]
    if not sum(counts):
        raise ValueError("There is nothing to train on: the data set has no items.")
    epoch, position = divmod(number, sum(counts))
    stream = generator(seed, epoch, "data order")
    batches = []
    for group in groups:
        order = [group[index] for index in torch.randperm(len(group), generator=stream).tolist()]
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[torch.randperm(len(batches), generator=stream).tolist()[position]]

"""Batches of a data set whose items are all alike."""

from collections.abc import Sequence

import torch

from dora_mm.utils.randomness import generator


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The item indices of batch `step`.

    Batches are consecutive slices of an endless sequence of seeded permutations. Every item is used once per epoch, and
    a batch may straddle two epochs, so that no item is ever dropped.

    Args:
        num_items: Size of the data set.
        batch_size: Items per batch.
        step: Number of the batch, from 0.
        seed: The seed of the run.

    Raises:
        ValueError: There are no items.
    """
    if num_items < 1:
        raise ValueError("There is nothing to train on: the data set has no items.")
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // num_items for position in positions}
    orders = {epoch: _epoch_order(num_items, epoch, seed) for epoch in epochs}
    return [orders[position // num_items][position % num_items] for position in positions]


def _epoch_order(num_items: int, epoch: int, seed: int) -> Sequence[int]:
    return torch.randperm(num_items, generator=generator(seed, epoch, "data order")).tolist()

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


def batch_of_groups(groups: Sequence[Sequence[int]], batch_size: int, number: int, seed: int) -> list[int]:
    """Batch `number` where only items of one group may share a batch (pictures of one shape).

    An epoch holds every item once, in batches of `batch_size` or, at the end of a group, fewer; items are shuffled
    within their group and batches among each other, anew in every epoch.

    Raises:
        ValueError: there are no items.
    """
    counts = [-(-len(group) // batch_size) for group in groups]
    if not sum(counts):
        raise ValueError("There is nothing to train on: the data set holds no items.")
    epoch, position = divmod(number, sum(counts))
    stream = generator(seed, epoch, "data order")
    batches = []
    for group in groups:
        order = [group[index] for index in torch.randperm(len(group), generator=stream).tolist()]
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[torch.randperm(len(batches), generator=stream).tolist()[position]]

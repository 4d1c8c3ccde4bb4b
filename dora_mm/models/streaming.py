"""Which blocks of a network wait in main memory: see core/wrappers/streaming.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dora_mm.config.streaming import Amount
from dora_mm.core import TargetMap
from dora_mm.core.targets import blocks_of
from dora_mm.core.wrappers.streaming import is_streamed, streamed_tensors

NOTHING = "does nothing on a CPU, where all weights are in main memory anyway"
RESERVED = 1.0e9  # bytes of a GPU that its libraries take
TOGETHER = 2  # blocks of which a device holds the weights at once: that which computes, and the next


def repeated_blocks(network: nn.Module, targets: TargetMap | None = None) -> list[nn.Module]:
    """The blocks that a network repeats: those that its class of diffusers names, its target map, or transformers."""
    if names := getattr(network, "_repeated_blocks", None):
        return [module for module in network.modules() if type(module).__name__ in names]
    if targets is not None:
        return [network.get_submodule(path) for path in blocks_of(network, targets)]
    named = getattr(network, "_no_split_modules", None) or ()
    found = [module for module in network.modules() if type(module).__name__ in named]
    counts = Counter(map(type, found))
    return [module for module in found if counts[type(module)] > 1]


def streamable_blocks(network: nn.Module, targets: TargetMap | None = None) -> list[nn.Module]:
    """The repeated blocks of a network that share no weight with others, without those inside of others."""
    blocks = repeated_blocks(network, targets)
    inside = {id(module) for block in blocks for module in block.modules() if module is not block}
    blocks = [block for block in blocks if id(block) not in inside]
    holders = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    own = [Counter(id(p) for module in block.modules() for p in module.parameters(recurse=False)) for block in blocks]
    return [block for block, found in zip(blocks, own, strict=True) if all(holders[i] == n for i, n in found.items())]


def block_bytes(blocks: Sequence[nn.Module], stored: Mapping[int, int] | None = None) -> list[int]:
    """The bytes that are streamed of each block.

    Args:
        blocks: Blocks, also on the meta device.
        stored: The bytes of weights that will be quantised, by `id`.
    """
    known = stored or {}
    return [sum(known.get(id(t), t.numel() * t.element_size()) for t in streamed_tensors(block)) for block in blocks]


def chosen(sizes: Sequence[int], amount: Amount) -> list[int]:
    """The numbers of the blocks that wait, with as many that stay between them everywhere: so copies have more time.

    Args:
        sizes: The bytes of all blocks, in their order.
        amount: How much of them.
    """
    wanted = amount.num_bytes if amount.share is None else amount.share * sum(sizes)
    for count in range(1, len(sizes) + 1):
        found = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        if count == amount.blocks or (wanted is not None and sum(sizes[i] for i in found) >= wanted):
            return found
    return list(range(len(sizes)))


def freed(sizes: Sequence[int], waiting: Sequence[int]) -> int:
    """The bytes that a device has more where these blocks wait: theirs, but for the two largest of them."""
    found = sorted(sizes[i] for i in waiting)
    return sum(found[:-TOGETHER])


def least_that_frees(sizes: Sequence[int], wanted: float) -> Amount | None:
    """The least number of blocks that free so many bytes; all of them where these are too few, None where none is."""
    if wanted <= 0:
        return None
    counts = (n for n in range(1, len(sizes)) if freed(sizes, chosen(sizes, Amount(blocks=n))) >= wanted)
    return Amount(blocks=next(counts, len(sizes)))


def needed_on(device: torch.device, total: float, sizes: Sequence[int]) -> Amount | None:
    """The least number of blocks that have to wait for something to fit on a device as it is now.

    Args:
        device: A GPU.
        total: The bytes that it takes if nothing waits.
        sizes: The bytes of its blocks.
    """
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return least_that_frees(sizes, total - (free - RESERVED))


def blocks_to_stream(
    network: nn.Module, targets: TargetMap | None, amount: Amount, device: torch.device
) -> list[nn.Module]:
    """The blocks of a network that wait; none on a CPU, where all weights are in main memory anyway."""
    if device.type in ("cpu", "meta") or any(map(is_streamed, network.modules())):
        return []
    blocks = streamable_blocks(network, targets)
    return [blocks[i] for i in chosen(block_bytes(blocks), amount)]

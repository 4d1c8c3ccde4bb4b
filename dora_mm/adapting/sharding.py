"""Sharding: the frozen weights of the main network, divided among processes by torch's FSDP2.

What is trained stays whole in each process, with its gradients and the state of the optimizer: adapters are small, and
all that reads or writes them (averages, clipping, checkpoints, files) is then as without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.core import TargetMap
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.wrappers.sharded import shard_frozen
from dora_mm.models.streaming import repeated_blocks


@dataclass(frozen=True)
class Division:
    """How the main network is divided.

    Attributes:
        network: The network.
        blocks: Its modules that are gathered one at a time, inner ones first.
        trained: Its trained parameters.
    """

    network: nn.Module
    blocks: tuple[nn.Module, ...]
    trained: frozenset[nn.Parameter]

    def apply(self, device: torch.device) -> None:
        """Divides the network among all processes, and moves it to the device that it computes on."""
        shard_frozen(self.network, self.blocks, self.trained, device)
        for module in self.network.modules():
            if isinstance(module, AdaptedLayer):
                module.follow_weight()  # on another device the norms differ in the last bits
                for other in module.adaptation.stacked.values():
                    other.tensors = {name: tensor.to(device) for name, tensor in other.tensors.items()}

    def sizes(self, stored: Mapping[int, int]) -> tuple[int, int]:
        """The bytes of all weights that are divided, and of those that a process has gathered at most.

        The latter are what is outside of the blocks, and the two largest blocks: the one that computes and the next.

        Args:
            stored: The bytes of weights that will be quantised, by `id`.
        """
        seen = {id(parameter) for parameter in self.trained}
        found = []
        for module in (*self.blocks, self.network):
            own = {id(p): p for p in module.parameters() if id(p) not in seen}
            seen |= own.keys()
            found.append(sum(stored.get(i, p.numel() * p.element_size()) for i, p in own.items()))
        *blocks, rest = found
        return sum(found), rest + sum(sorted(blocks)[-2:])


def division(
    trained: TrainedNetworks,
    target_maps: Mapping[str, TargetMap],
    *,
    reaches_all: bool = True,
) -> Division:
    """Divides the main network by those of its repeated blocks that hold trained parameters.

    Only these run in every process in the same order, forward and backward: what holds none may run without gradients
    in one process, and with gradients in another.

    Args:
        trained: What is trained.
        target_maps: The target maps, by component.
        reaches_all: Whether every batch reaches all trained parameters; else, as one without images does, those of the
            language model alone. Blocks of the others are not gathered one by one.

    Raises:
        ValueError: There is no such block, or nothing is frozen in it.
    """
    component, network = next(iter(trained.networks.items()))
    own = frozenset({*network.parameters()} & {*trained.parameters.values()})
    missed: set[int] = set()
    if not reaches_all and (report := trained.reports.get(component)):
        paths = [module.path for module in report.modules if not module.part.startswith("text.")]
        missed = {id(network.get_submodule(path)) for path in paths}

    def divides(block: nn.Module) -> bool:
        inside = set(block.parameters())
        return bool(inside & own and inside - own) and not any(id(module) in missed for module in block.modules())

    blocks = tuple(filter(divides, reversed(repeated_blocks(network, target_maps[component]))))
    if not blocks:
        raise ValueError("train.shard: no block of the network has frozen weights beside trained ones: leave it out")
    return Division(network, blocks, own)

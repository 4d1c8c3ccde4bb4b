"""Parameters that FSDP2 has sharded: outside of a pass they are DTensors, of which each process holds a part.

Functions that read or write whole parameters are collective then: every process of the group calls them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def shard_frozen(
    network: nn.Module, blocks: Iterable[nn.Module], gathered: Collection[nn.Parameter], device: torch.device
) -> None:
    """Divides the parameters of a network among all processes, but for some that each keeps whole: the trained ones.

    A block is gathered for its forward pass, and again for its backward pass; the rest of the network from its first
    pass to the end of the backward pass. All processes have to run the same blocks in the same order.

    Args:
        network: The network, adapted, on any device.
        blocks: Modules of it, inner ones before those around them.
        gathered: The parameters that stay whole.
        device: Where the network computes.

    Raises:
        ValueError: This torch is too old.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"torch {torch.__version__} cannot leave the trained parameters whole: shard with a newer one")
    ignored = {*gathered, *(p for p in network.parameters() if p.dim() == 0)}  # fully_shard takes no scalars
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would lay out gathered weights of 4 bits anew
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
    settings: dict[str, Any] = {"mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),))}
    for module in (*blocks, network):
        fully_shard(module, **settings, ignored_params=ignored)
    if hasattr(network, "generate"):  # it may call parts of a network, and not only all of it
        register_fsdp_forward_method(network, "generate")
    assert all(is_sharded(p) != (p in ignored) for p in network.parameters())


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(t, "full_tensor")


def gathered(t: Tensor) -> Tensor:
    """Returns all of a tensor, gathered where it is sharded; detached."""
    t = t.detach()
    return t.full_tensor() if is_sharded(t) else t  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Writes a full tensor into a parameter in place, each process its part; FSDP keeps the memory of its parts."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)  # pyright: ignore
    parameter.copy_(value)


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model to which `fully_shard` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported here: a model that it has sharded did
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def check_not_sharded(model: nn.Module) -> None:
    """Raises ValueError where `fully_shard` was applied to a model or a module inside."""
    if fsdp_modules(model):
        raise ValueError(
            "the model is sharded: fully_shard manages the parameters that it had then, so inject before it"
        )


def reshard(model: nn.Module) -> None:
    """Makes all parameters of a sharded model DTensors: FSDP leaves those of the root gathered after a forward pass."""
    for module in fsdp_modules(model):
        module.reshard()  # pyright: ignore[reportCallIssue]

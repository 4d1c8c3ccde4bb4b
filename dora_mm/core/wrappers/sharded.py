"""Parameters that FSDP2 has sharded: outside of a pass they are DTensors, of which each process holds a part.

Functions that read or write whole parameters are collective then: every process of the group calls them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """Returns all of a tensor, gathered where it is sharded; detached."""
    t = t.detach()
    return t.full_tensor() if is_sharded(t) else t  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Writes a whole value into a parameter in place, each process its part; FSDP keeps the memory of its parts."""
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

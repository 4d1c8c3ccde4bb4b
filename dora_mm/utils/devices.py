"""The device used where the caller names none."""

import os

import torch
from torch import distributed


def default_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU), else the CPU; one per process where several were started.

    Raises:
        ValueError: This machine has fewer accelerators than processes.
    """
    if "LOCAL_RANK" in os.environ and not (distributed.is_available() and distributed.is_initialized()):
        return _own_device(int(os.environ["LOCAL_RANK"]))
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device


def _own_device(index: int) -> torch.device:
    """The device of a process that was started with others; accelerate would make a process group for it."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return torch.device("cpu")
    if index >= (count := torch.accelerator.device_count()):
        raise ValueError(f"more processes were started on this machine than it has devices: start {count}")
    if index:
        torch.get_device_module(found).set_device(index)
    return torch.device(found.type, index)

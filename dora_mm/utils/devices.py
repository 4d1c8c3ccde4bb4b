"""The device used where the caller names none."""

import torch


def default_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU), else the CPU; one per process in distributed runs."""
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device

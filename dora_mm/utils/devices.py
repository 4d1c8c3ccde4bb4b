"""Which device a program runs on that is given none."""

import torch


def default_device() -> torch.device:
    """The accelerator that torch sees (CUDA, MPS, XPU), else the CPU; of several processes each has its own."""
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device

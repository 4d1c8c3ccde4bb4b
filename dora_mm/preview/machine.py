"""Hardware detection: the GPUs of a machine, their memory and precision, and the recipe that fits."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
SPARE = 1.5  # GB of a GPU that its name counts and torch does not: a GPU of 24 GB has 22.5 to 23.7


class GPUInfo(NamedTuple):
    """A GPU, or another accelerator."""

    name: str
    memory: float  # GB, of 2^30 bytes
    precision: str  # the best half precision


def gpus() -> list[GPUInfo]:
    """The CUDA (or ROCm) devices that torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        bf16 = about.major >= 8 or torch.version.hip is not None  # earlier ones emulate it
        found.append(GPUInfo(about.name, about.total_memory / 2**30, "bf16" if bf16 else "fp16"))
    return found


def largest_gpu() -> GPUInfo | None:
    """The GPU with the most memory; None without one."""
    return max(gpus(), key=lambda gpu: gpu.memory, default=None)


def fitting(recipes: Mapping[int, T], gpu: GPUInfo | None) -> T:
    """The largest recipe that fits the GPU's memory; the smallest without a GPU, or if none fits.

    Args:
        recipes: By the GB that they need, at least one.
        gpu: The GPU, or None.
    """
    memory = gpu.memory + SPARE if gpu else 0
    return recipes[max((size for size in recipes if size <= memory), default=min(recipes))]

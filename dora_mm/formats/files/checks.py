"""Checks that the tensors of adapters are floating-point and finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite; None where all are finite."""
    return next((name for name, t in tensors if t.is_floating_point() and not is_finite(t)), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: `aminmax` passes NaN on, and is ten times as fast as `isfinite`."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor.detach()))


def check_dtype(name: str, tensor: Tensor, *, parameter: bool = False) -> Tensor:
    """Returns a tensor of an adapter, whose values are not read.

    Args:
        name: What the message calls it.
        tensor: The tensor.
        parameter: Whether it is an extra parameter, of which some are integers, such as the masks of GPT-2.

    Raises:
        ValueError: It has a dtype that no tensor of an adapter has.
    """
    is_number = parameter and not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.dtype not in DTYPES and not is_number:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has values of type {kind}: save it in float32")
    return tensor

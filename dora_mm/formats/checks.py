"""What the tensors of every adapter must be: floating-point, finite, and of shapes that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite; None where all are finite."""
    return next((name for name, t in tensors if t.is_floating_point() and not torch.isfinite(t).all()), None)


def why_unusable(tensors: Mapping[str, Tensor], rank: int) -> str | None:
    """What is wrong with the dtypes and shapes of a layer's tensors, or None; the values are not read.

    Args:
        tensors: `lora_A` (R, I) or (R, I, *K), `lora_B` (O, R), `magnitude` (O,) and `weight`, as far as there are any.
        rank: R.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return f"{name} has values of type {_name(tensor.dtype)}: save it in float32"
    A, B, magnitude = (tensors.get(name) for name in ("lora_A", "lora_B", "magnitude"))
    if A is not None and (A.dim() < 2 or A.shape[0] != rank):
        return f"lora_A has shape {tuple(A.shape)}, which is not one of rank {rank}"
    if B is not None and (B.dim() != 2 or B.shape[1] != rank):
        return f"lora_B has shape {tuple(B.shape)}, which is not one of rank {rank}"
    rows = {B.shape[0], A.shape[1]} if A is not None and B is not None else None  # of the output, or of the input axis
    if magnitude is not None and (magnitude.dim() != 1 or (rows and magnitude.shape[0] not in rows)):
        return f"magnitude has shape {tuple(magnitude.shape)}, which is not one value per row"
    return None


def why_no_parameter(tensor: Tensor) -> str | None:
    """What is wrong with the dtype of an extra parameter, or None: some are integers, such as the masks of GPT-2."""
    allowed = tensor.dtype in DTYPES or not (tensor.is_floating_point() or tensor.is_complex())
    return None if allowed else f"has values of type {_name(tensor.dtype)}: save it in float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

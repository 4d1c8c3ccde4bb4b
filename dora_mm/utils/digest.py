"""Digests of weights and files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def module_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, in hex (1 s for some 3 GB)."""
    return _digest(sorted(module.state_dict().items()))


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors in safetensors files, in hex.

    It is that of the weights, in whatever files they are, and whatever dtype they are loaded in.
    """
    opened: list[Any] = [safe_open(file, framework="pt") for file in files]
    holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    return _digest((name, holder[name].get_tensor(name)) for name in sorted(holder))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

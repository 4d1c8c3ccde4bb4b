"""A safetensors file that is read tensor by tensor: memory holds one tensor at a time, whatever the size of the file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """Where a tensor is: its dtype, its shape, and its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """A safetensors file, of which the header has been read and checked.

    Attributes:
        path: The file.
        entries: Its tensors by key.
        metadata: The text entries of its header.

    Raises:
        ValueError: The file is missing, damaged, truncated, or a pickle.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from `start` to `stop`.

        Raises:
            ValueError: The file has become shorter.
        """
        raise NotImplementedError

    def copy_with(self, target: Path, update) -> None:
        raise NotImplementedError

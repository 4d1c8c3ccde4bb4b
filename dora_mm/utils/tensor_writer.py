"""A safetensors file that is written tensor by tensor, so that memory holds one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dora_mm.utils.atomic import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}


class TensorWriter:
    """Adds tensors to an open file; the header, for which room was left, is written at the end.

    Args:
        file: The file, at its beginning.
        room: An upper bound of the length of the header in bytes; what it does not need is filled with spaces, as the
            format allows.
    """

    def __init__(self, file: BinaryIO, room: int):
        self._file = file
        self._room = -(-room // 8) * 8
        self._entries: dict[str, Any] = {}
        self._end = 0
        file.write(bytes(8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor.

        Raises:
            ValueError: There is a tensor of this name already.
        """
        import torch  # here, so that commands which only write text need not load torch

        if name in self._entries:
            raise ValueError(f"two tensors would be called {name}")
        flat = tensor.detach().cpu().contiguous()
        begin, self._end = self._end, self._end + flat.numel() * flat.element_size()
        dtype = _DTYPES[str(flat.dtype).removeprefix("torch.")]
        self._entries[name] = {"dtype": dtype, "shape": list(flat.shape), "data_offsets": [begin, self._end]}
        self._file.write(flat.reshape(-1).view(torch.uint8).numpy().data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        header = json.dumps(
            {"__metadata__": dict(sorted(metadata.items())), **self._entries}, separators=(",", ":")
        ).encode()
        assert len(header) <= self._room, (len(header), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def write_tensors(path: Path, room: int, write: Callable[[TensorWriter], Mapping[str, str]]) -> None:
    """Writes a safetensors file atomically, tensor by tensor.

    Args:
        path: The final file; it is replaced if it exists, and kept if `write` raises an error.
        room: An upper bound of the length of the header in bytes.
        write: Adds the tensors, and returns the text entries of the header.

    Raises:
        OSError: The file cannot be written.
    """

    def run(partial: Path) -> None:
        with partial.open("wb") as file:
            writer = TensorWriter(file, room)
            writer.finish(write(writer))

    write_atomically(path, run)

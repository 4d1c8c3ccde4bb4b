"""Safetensors files, without the writer of the library: it has a temporary file of its own, which a kill leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dora_mm.utils.atomic import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "__metadata__"  # where the text entries of a header are
DTYPES = {  # torch's names by those in headers, in the order in which the library writes tensors
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {f"torch.{name}": short for short, name in DTYPES.items()}
_TensorSpec = tuple[str, Sequence[int], int]  # of a tensor: its dtype in headers, its shape, its bytes


def header_bytes(specs: Iterable[tuple[str, _TensorSpec]], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The beginning of a file whose tensors lie one behind the other.

    Args:
        specs: The name of each tensor, with its dtype, shape and size in bytes, in their order.
        metadata: Text entries of the header.
        room: The length of the header's text; 0: as long as it is. What it does not need is filled with spaces.
    """
    found: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape, size) in specs:
        begin, end = end, end + size
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    room = room or len(text) + -len(text) % 8
    assert len(text) <= room, (len(text), room)
    return room.to_bytes(8, "little") + text.ljust(room)


def in_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names of tensors in the order in which the safetensors library writes them, from their dtypes in headers."""
    order = {dtype: number for number, dtype in enumerate(DTYPES)}
    return sorted(dtypes, key=lambda name: (order[dtypes[name]], name))


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
        self._specs: dict[str, _TensorSpec] = {}
        file.write(bytes(8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor.

        Raises:
            ValueError: There is a tensor of this name already, or it is of a dtype that is not written.
        """
        if name in self._specs:
            raise ValueError(f"two tensors would be called {name}")
        self._specs[name] = _spec(name, tensor)
        _write(self._file, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        header = header_bytes(self._specs.items(), metadata, self._room)
        self._file.seek(0)
        self._file.write(header)


def writable(tensor: Tensor) -> bool:
    """Whether a tensor is of a dtype that is written."""
    return str(tensor.dtype) in _NAMES


def _spec(name: str, tensor: Tensor) -> _TensorSpec:
    dtype = _NAMES.get(str(tensor.dtype))
    if dtype is None:
        raise ValueError(f"{name} is of {tensor.dtype}, which is not written")
    return dtype, tensor.shape, tensor.numel() * tensor.element_size()


def _write(file: BinaryIO, tensor: Tensor) -> None:
    import torch  # here, so that commands which only write text need not load torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel() <= 1:  # contiguous, whatever its stride is
        flat = flat.as_strided(flat.shape, (1,))
    file.write(flat.view(torch.uint8).numpy().data)


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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, flushes: bool = True
) -> None:
    """Writes a safetensors file; see `write_tensor_file` and `write_atomically`."""
    write_atomically(path, lambda partial: write_tensor_file(partial, tensors, metadata), flushes=flushes)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; the same tensors and entries give the same bytes, in whatever order they are given.

    Args:
        path: The file; it is replaced if it exists.
        tensors: Tensors on any device by name; they may be views or share memory.
        metadata: Text entries of the file's header.

    Raises:
        OSError: The file cannot be written.
        ValueError: A tensor is of a dtype that is not written.
    """
    specs = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    order = in_order({name: dtype for name, (dtype, _, _) in specs.items()})
    with path.open("wb") as file:
        file.write(header_bytes(((name, specs[name]) for name in order), metadata))
        for name in order:
            _write(file, tensors[name])

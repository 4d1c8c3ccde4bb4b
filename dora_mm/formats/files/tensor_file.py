"""Safetensors files that anybody may have written: a header that is checked, and tensors that are read one by one.

    8 bytes: the length of the header, little-endian | the header, JSON | the tensors' bytes, without gaps

Memory holds one tensor, whatever the size of the file. The safetensors library does not tell where in the file a tensor
is, which is needed to replace it in a copy, and sets other bounds.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dora_mm.formats.files.json_text import MAX_BYTES, parse_json
from dora_mm.utils.messages import first_line

FORMAT_KEY = "dora_mm_format"  # in the header of our own files

_MAX_DIMENSIONS = 8
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how files of torch.save begin
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorEntry(NamedTuple):
    """Where a tensor is: its dtype, its shape, and its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """The length of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The part of the tensor that is its rows from `start` to `stop`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return TensorEntry(self.dtype, (stop - start, *self.shape[1:]), self.offset + start * row)


class TensorFile:
    """A safetensors file, of which the header has been read and checked.

    Attributes:
        path: The file.
        entries: Its tensors by key, in the order of the file.
        metadata: The text entries of its header.

    Raises:
        ValueError: The file is missing, damaged, truncated, or a pickle.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if path.suffix in PICKLES or (start.startswith(_PICKLED) and length > MAX_BYTES):
                    raise pickle_error(path)
                self.entries, self.metadata = _read_header(file, length, path.stat().st_size)
        except (_DamagedError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error

    def read(self, key: str) -> Tensor:
        """Reads a whole tensor."""
        return self.read_entry(self.entries[key])

    def read_entry(self, entry: TensorEntry) -> Tensor:
        """Reads a tensor or a part of one.

        Raises:
            ValueError: The file cannot be read, or has become shorter.
        """
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                _fill(file, _bytes_of(tensor))
        except (_DamagedError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        return tensor

    def map(self, key: str) -> Tensor:
        """A tensor whose values come from the disk when they are used, not before.

        Raises:
            ValueError: The file cannot be read.
        """
        dtype, shape, offset = entry = self.entries[key]
        if not entry.num_bytes:
            return torch.empty(shape, dtype=dtype)
        part = self._storage[offset : offset + entry.num_bytes]  # its offset need not be a multiple of the dtype's size
        return torch.asarray(part, dtype=torch.uint8).view(dtype).view(shape)

    @cached_property
    def _storage(self) -> Any:
        """The file in memory, from which pages are read when they are used; writing there does not change the file."""
        try:
            return torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {first_line(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of the header of a safetensors file; raises ValueError where it cannot be read."""
    return TensorFile(path).metadata


def pickle_error(path: Path) -> ValueError:
    """The error for a file that must not be opened."""
    return ValueError(
        f"{path} is a pickle, which can run any code when it is opened: save it as safetensors in the tool that made it"
    )


def overwrite(path: Path, entry: TensorEntry, tensor: Tensor) -> None:
    """Writes a tensor, of the entry's shape and dtype, into an existing file."""
    assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(_bytes_of(tensor.contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _DamagedError("it ends too early")
        done += count


class _DamagedError(Exception):
    """What is wrong with a file."""


def _read_header(file: BinaryIO, length: int, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if size < 8 or length > size - 8:
        raise _DamagedError("it is shorter than its header says")
    if length > MAX_BYTES:
        raise _DamagedError(f"its header has {length} bytes, and at most {MAX_BYTES} are read")
    try:
        header = parse_json(file.read(length), "its header")
    except ValueError as error:
        raise _DamagedError(error) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _DamagedError("the metadata of its header is not a table of texts")
    return _entries(header, 8 + length, size), metadata


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, TensorEntry]:
    spans = {key: _span(key, found) for key, found in header.items()}
    entries, offset = {}, start
    for key, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        entry = TensorEntry(dtype, shape, start + begin)
        if entry.offset != offset or end - begin != entry.num_bytes:
            raise _DamagedError(f"the place of {key[:200]} in it does not fit its shape")
        entries[key] = entry
        offset += entry.num_bytes
    if offset != size:
        raise _DamagedError(f"it has {size} bytes, and its header describes {offset}")
    return entries


def _span(key: str, found: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """The dtype, the shape, and the first and last place of a tensor, from its entry in the header."""
    fields = found if isinstance(found, dict) else {}
    dtype, shape, place = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _DamagedError(f"{key[:200]} has the unknown dtype {str(dtype)[:20]}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or not _naturals(place) or len(place) != 2:
        raise _DamagedError(f"the header does not describe {key[:200]}")
    return _DTYPES[dtype], tuple(shape), place[0], place[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

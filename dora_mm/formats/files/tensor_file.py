"""Safetensors files that anybody may have written: a header that is checked, and tensors that are read one by one.

    8 bytes: the length of the header, little-endian | the header, JSON | the tensors' bytes, without gaps

Memory holds one tensor, whatever the size of the file. The safetensors library does not tell where in the file a tensor
is, which is needed to replace it in a copy; and its process ends where a file becomes shorter while it is read (SIGBUS,
since it maps the file into memory).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dora_mm.formats.files.checks import DTYPES, is_finite
from dora_mm.formats.files.header import DamagedError, TensorEntry, parse_header, write_header
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.json_text import MAX_BYTES
from dora_mm.utils.messages import first_line
from dora_mm.utils.progress import BYTES, Progress

FORMAT_KEY = "dora_mm_format"  # in the header of our own files
_PIECE = 2**20  # bytes that are read at once: they stay in the cache of a core
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how files of torch.save begin


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
            if path.exists() and not path.is_file():  # a named pipe would wait for ever
                raise DamagedError("it is a folder or a device, not a file")
            with path.open("rb") as file:
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if path.suffix in PICKLES or (start.startswith(_PICKLED) and length > MAX_BYTES):
                    raise pickle_error(path)
                size = path.stat().st_size
                self.entries, self.metadata = parse_header(_header_of(file, length, size), size)
        except (DamagedError, OSError) as error:
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
        with self._opened() as file:
            file.seek(entry.offset)
            _fill(file, _bytes_of(tensor))
        return tensor

    def data(self) -> Iterator[bytes]:
        """The bytes of all tensors in the order of the file, some at a time.

        Raises:
            ValueError: The file cannot be read, or has become shorter.
        """
        start = next((entry.offset for entry in self.entries.values()), 0)
        end = start + sum(entry.num_bytes for entry in self.entries.values())
        yield from (self.read_bytes(offset, min(_PIECE, end - offset)) for offset in range(start, end, _PIECE))

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Bytes of the file.

        Raises:
            ValueError: The file cannot be read, or has become shorter.
        """
        found = bytearray(length)
        with self._opened() as file:
            file.seek(offset)
            _fill(file, memoryview(found))
        return bytes(found)

    def numbers(self, keys: Iterable[str]) -> dict[str, float]:
        """The values of those tensors that are one number.

        Raises:
            ValueError: The file cannot be read, or has become shorter.
        """
        found: dict[str, float] = {}
        with self._opened() as file:
            for key in keys:
                dtype, shape, offset = self.entries[key]
                if math.prod(shape) == 1 and not dtype.is_complex:
                    file.seek(offset)
                    number = bytearray(dtype.itemsize)
                    _fill(file, memoryview(number))
                    found[key] = float(torch.frombuffer(number, dtype=dtype))
        return found

    def not_finite(self) -> list[str]:
        """The keys of tensors with values that are NaN or infinite; the whole file is read, a few MB at a time.

        Raises:
            ValueError: The file cannot be read, or has become shorter.
        """
        entries = {key: entry for key, entry in self.entries.items() if entry.dtype in DTYPES and entry.num_bytes}
        buffer = torch.empty(_PIECE, dtype=torch.uint8)
        total = sum(entry.num_bytes for entry in entries.values())
        with Progress(f"checking {self.path.name}", total, BYTES) as bar, self._opened() as file:
            return [key for key, entry in entries.items() if not _has_finite(file, entry, buffer, bar)]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except (DamagedError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

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


def write_with_metadata(file: TensorFile, target: Path, metadata: Mapping[str, str]) -> None:
    """Writes a file with other metadata, byte for byte the same behind its header; it may replace the file itself.

    Raises:
        ValueError: The header would be too long, the file cannot be read, or the target is another one that exists.
        OSError: The target cannot be written.
    """
    header = write_header(file.entries, metadata)
    if len(header) > MAX_BYTES:
        raise ValueError(f"the header of {file.path} would have {len(header)} bytes, and at most {MAX_BYTES} are read")

    def write(partial: Path) -> None:
        with partial.open("wb") as copy:
            copy.write(header)
            copy.writelines(file.data())

    write_atomically(target, write, is_new=target != file.path)


def pickle_error(path: Path) -> ValueError:
    """The error for a file that must not be opened."""
    return ValueError(
        f"{path} is a pickle, which can run any code when it is opened: save it as safetensors in the tool that made it"
    )


def copy_around(source: Path, target: Path, new: Iterable[tuple[TensorEntry, Tensor]]) -> None:
    """Copies a file with new values for some tensors.

    It is written from its beginning to its end: filling holes later takes the system three times as long.

    Args:
        source: The file.
        target: The copy.
        new: Tensors in the order of the file, each in its entry's shape and dtype; they may be computed on demand.

    Raises:
        ValueError: The file has become shorter.
    """
    buffer = memoryview(bytearray(_PIECE))
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as copy:

        def copy_until(end: int) -> None:
            for offset in range(old.tell(), end, _PIECE):
                piece = buffer[: min(_PIECE, end - offset)]
                try:
                    _fill(old, piece)
                except DamagedError as error:
                    raise ValueError(f"{source} cannot be read: {error}") from error
                _write(copy, piece)

        for entry, tensor in new:
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
            copy_until(entry.offset)
            assert copy.tell() == entry.offset, "tensors are not in the order of the file"
            _write(copy, _bytes_of(tensor.contiguous()))
            old.seek(entry.offset + entry.num_bytes)
        copy_until(source.stat().st_size)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _has_finite(file: Any, entry: TensorEntry, buffer: Tensor, bar: Progress) -> bool:
    """Whether all values of a tensor are finite; it is read into the buffer, piece by piece."""
    file.seek(entry.offset)
    for start in range(0, entry.num_bytes, _PIECE):
        piece = buffer[: min(_PIECE, entry.num_bytes - start)]
        _fill(file, piece.numpy().data)
        bar.advance(len(piece))
        if not is_finite(piece.view(entry.dtype)):
            return False
    return True


def _fill(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise DamagedError("it ends too early")
        done += count


def _write(file: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def _header_of(file: BinaryIO, length: int, size: int) -> bytes:
    if size < 8 or length > size - 8:
        raise DamagedError("it is shorter than its header says")
    if length > MAX_BYTES:
        raise DamagedError(f"its header has {length} bytes, and at most {MAX_BYTES} are read")
    return file.read(length)

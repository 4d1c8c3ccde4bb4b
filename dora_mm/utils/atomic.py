"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import filecmp
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dora_mm.utils.lock import NOFOLLOW, check_lock
from dora_mm.utils.partials import partial_of

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object], *, flushes: bool = True) -> None:
    """Writes a file under a temporary name in the same folder, flushes it to disk and renames it to `path`.

    Missing parent folders are created. After an error the temporary file is removed and an existing `path` is kept.

    Args:
        path: The final file; it is replaced if it exists with other content, and else stays as it is, with its time.
        write: Called with the temporary path, to which it must write the content.
        flushes: Whether to wait for the disk. Without, a file may be damaged where the power fails.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
        ValueError: Another process has taken over the folder, of which this one was the only writer.
    """
    check_lock(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # a link, which would be followed
        partial.touch()
        write(partial)
        if flushes:
            flush(partial)
        check_lock(path)
        if not (path.is_file() and filecmp.cmp(partial, path, shallow=False)):
            os.replace(partial, path)
    except FileNotFoundError:
        check_lock(path)  # who has taken the folder over has removed what was half written in it
        raise
    finally:
        partial.unlink(missing_ok=True)
    if flushes:
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; see `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Appends UTF-8 text to a file; a process that is killed meanwhile may leave a part of it.

    Raises:
        OSError: It cannot be written, or is a link to another file.
    """
    check_lock(path)
    with open_to_append(path) as file:
        file.write(text)


def open_to_append(path: Path) -> TextIO:
    """Opens a file of UTF-8 text to append to it; what a link leads to is not written to.

    Raises:
        OSError: It cannot be opened, or is a link.
    """
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | NOFOLLOW, 0o666))


def flush(path: Path) -> None:
    """Waits until the content of a file, or the directory entries of a folder, are on disk (fsync)."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """
    from safetensors.torch import save_file  # here, so that commands which only write text need not load torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    permissions = path.stat().st_mode  # by the umask: safetensors creates files that only their owner can read
    save_file(contiguous, path, metadata=dict(metadata))
    path.chmod(permissions)
    with path.open("r+b") as file:  # safetensors writes the entries in another order in each process
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(ordered) == size, path
        file.seek(8)
        file.write(ordered)

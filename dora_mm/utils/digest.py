"""Digests of weights and files."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dora_mm.utils.atomic import write_text
from dora_mm.utils.home import cache_folder
from dora_mm.utils.progress import BYTES, Progress, tracked

REMEMBERED = 1 << 26  # bytes; a digest of less takes 0.04 s


def module_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, in hex (1 s for some 3 GB)."""
    return _digest(sorted(module.state_dict().items()))


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors in safetensors files, in hex.

    It is that of the weights, in whatever files they are, and whatever dtype they are loaded in. That of large files is
    remembered.

    Raises:
        ValueError: A file is damaged.
    """
    files = list(files)

    def opened(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def computed() -> str:
        holder = {name: found for found in map(opened, files) for name in found.keys()}  # noqa: SIM118
        tensors = ((name, holder[name].get_tensor(name)) for name in sorted(holder))
        return _digest(tensors, len(holder))

    return _remembered(files, "tensors", computed)


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], total: int | None = None) -> str:
    digest = hashlib.sha256()
    for name, tensor in tracked(tensors, "digest of the weights", "tensors", total):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_digest(path: Path) -> str:
    """SHA-256 of a safetensors file behind its header, in hex. That of large files is remembered."""

    def computed() -> str:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        return file_digest(path, start)

    return _remembered([path], "data", computed)


def file_digest(path: Path, start: int = 0) -> str:
    """SHA-256 of a file, from a byte on, in hex."""
    digest = hashlib.sha256()
    size = path.stat().st_size - start
    with path.open("rb") as file, Progress(f"digest of {path.name}", size, BYTES, hidden=size < REMEMBERED) as progress:
        file.seek(start)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


def known_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. That of a large one is remembered."""
    return _remembered([path], "file", partial(file_digest, path))


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names and the content of files, in hex. That of large files is remembered."""
    digests = ((file, known_digest(file)) for file in sorted(files))
    return hashlib.sha256("\n".join(f"{file.name} {digest}" for file, digest in digests).encode()).hexdigest()


def _remembered(files: Sequence[Path], kind: str, compute: Callable[[], str]) -> str:
    """A digest that large files have as long as their state stays the same: they are read once.

    It is kept in a file of its own under `~/.cache/dora_mm/digests` (or $XDG_CACHE_HOME), so that processes which
    write at the same time do not disturb each other. Without a home folder nothing is kept.
    """
    about = _facts(files)
    folder = cache_folder()
    if folder is None or sum(size for _, (size, *_) in about) < REMEMBERED:
        return compute()
    memory = folder / "digests" / hashlib.sha256(repr((kind, about)).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", found := memory.read_text(encoding="utf-8")):
            return found
    digest = compute()
    if _facts(files) == about:
        with contextlib.suppress(OSError):  # a home folder that cannot be written to
            write_text(memory, digest)
    return digest


def file_state(path: Path) -> tuple[int, int, int, int]:
    """The size, times and inode of a file, which change with its content.

    The time of its last change (ctime) is one of them, since no program sets it: the other one is put back by whoever
    copies, unpacks or edits with care. A new name or link of the file changes it, too, and then the file is read again.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _facts(files: Sequence[Path]) -> list[tuple[str, tuple[int, int, int, int]]]:
    return [(str(path), file_state(path)) for path in (file.resolve() for file in files)]

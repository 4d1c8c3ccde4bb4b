"""Tensors in files by content: each file is checked when it is read, and appears as a whole or not at all."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dora_mm.utils.home import expanded
from dora_mm.utils.tensor_writer import save_tensors

log = logging.getLogger(__name__)


class TensorCache:
    """Keeps tensors by name under keys, one file each.

    Args:
        folder: Where the files are; it is made when the first one is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = expanded(folder)

    def path(self, key: str) -> Path:
        """The file of a key, a SHA-256 in hex."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file of this key, damaged or not."""
        return self.path(key).exists()

    def read(self, key: str, needed: Collection[str]) -> dict[str, torch.Tensor] | None:
        """The tensors of a key; None if there are none, or if the file is damaged or lacks one that is needed."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                # copies: a map of a file that is cut short would end the process
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                intact = (file.metadata() or {}).get("sha256") == _checksum(tensors)
        except (SafetensorError, OSError):
            tensors, intact = {}, False
        if not intact or not set(needed) <= tensors.keys():
            log.warning("%s is damaged: it is computed again", path)
            return None
        return tensors

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps tensors, on any device."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Waiting for the disk takes up to 55 ms a file; a damaged one is computed again
        save_tensors(self.path(key), kept, {"sha256": _checksum(kept)}, flushes=False)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors, reverse=True):  # mean before logvar, as in all files that there are
        tensor = tensors[name]
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

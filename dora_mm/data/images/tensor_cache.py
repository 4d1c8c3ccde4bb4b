"""Tensors in files by content: each file is checked when it is read, and appears as a whole or not at all.

Each has the circumstances under which its tensors were computed.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dora_mm.utils.circumstances import NOTHING, Record, about_kept, circumstances
from dora_mm.utils.home import expanded
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.tensor_writer import save_tensors

log = logging.getLogger(__name__)


class TensorCache:
    """Keeps tensors by name under keys, one file each.

    Args:
        folder: Where the files are; it is made when the first one is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = expanded(folder)
        self._reported: set[str] = set()

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
        about = {"sha256": _checksum(kept), "circumstances": json.dumps(self._now)}
        save_tensors(self.path(key), kept, about, flushes=False)

    @cached_property
    def _now(self) -> Record:
        return circumstances()

    def report(self, keys: Iterable[str], things: str) -> None:
        """Warns once of tensors that were computed under other circumstances.

        Args:
            keys: The keys of kept tensors.
            things: The noun for them in the warning, in the plural.
        """
        new = list(dict.fromkeys(key for key in keys if key not in self._reported))
        self._reported.update(new)
        kept = ((self._circumstances(key), 1) for key in new)
        if message := about_kept(kept, self._now, f"{things} in {self.folder}"):
            log.warning(message)

    def _circumstances(self, key: str) -> Record:
        """The circumstances of a key; NOTHING for a damaged file, which is computed again when it is read."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return parse_json((file.metadata() or {}).get("circumstances", "{}"), key)
        except (SafetensorError, OSError, ValueError):
            return NOTHING


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors, reverse=True):  # mean before logvar, as in all files that there are
        tensor = tensors[name]
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

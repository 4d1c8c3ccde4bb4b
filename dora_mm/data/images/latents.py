"""Latents kept by content: nothing is served that another image, crop or VAE made."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dora_mm.data.images.buckets import Framing
from dora_mm.utils.atomic import save_tensors

log = logging.getLogger(__name__)
LAYOUT = "1"  # raise it when the pixels of an equal framing change


class Latents(NamedTuple):
    """The VAE's Gaussian; training draws from it anew every time. (C, h, w) each, or with a batch dimension."""

    mean: torch.Tensor
    logvar: torch.Tensor


def latent_key(digest: str, framing: Framing, background: str, vae: str) -> str:
    """Names the latents of one picture: file content, resize, crop, mirroring, background and VAE identity."""
    geometry = (framing.resized, framing.top, framing.left, framing.target_size, framing.flip)
    return hashlib.sha256(json.dumps([LAYOUT, digest, geometry, background, vae]).encode()).hexdigest()


class LatentCache:
    """Keeps latents in a folder, one file each, or in memory where no folder is given.

    For framings that come again (a centre crop, mirrored or not); a random crop has a new key every time.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder).expanduser() if folder is not None else None
        self.memory: dict[str, Latents] = {}

    def get(self, key: str, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]], source: object = "") -> Latents:
        """The latents of this key; `compute` makes mean and logvar where they are missing or damaged.

        Raises:
            ValueError: the computed latents are not finite (an fp16 SDXL VAE does that); names `source`.
        """
        found = self.memory.get(key) if self.folder is None else self._read(self._path(key))
        if found is not None:
            return found
        latents = Latents(*(tensor.detach().cpu().contiguous() for tensor in compute()))
        if not all(bool(tensor.isfinite().all()) for tensor in latents):
            raise ValueError(f"the VAE gives values that are not finite for {source or key}: encode in float32")
        if self.folder is None:
            self.memory[key] = latents
        else:
            save_tensors(self._path(key), latents._asdict(), {"sha256": _checksum(latents)})
        return latents

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, path: Path) -> Latents | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                latents = Latents(file.get_tensor("mean"), file.get_tensor("logvar"))
                intact = (file.metadata() or {}).get("sha256") == _checksum(latents)
        except (SafetensorError, OSError):
            intact, latents = False, None
        if not intact:
            log.warning("Damaged latents are computed again: %s", path)
        return latents if intact else None


def _checksum(latents: Latents) -> str:
    digest = hashlib.sha256()
    for tensor in latents:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

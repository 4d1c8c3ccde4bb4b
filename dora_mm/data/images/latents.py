"""A cache of VAE latents, keyed by everything they depend on: image content, framing, background and VAE."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.tensor_cache import TensorCache

LAYOUT = "1"  # increase it when the same framing gives different pixels


class Latents(NamedTuple):
    """The Gaussian that the VAE predicts for an image; training draws a new sample from it every time.

    Attributes:
        mean: (C, h, w), or (B, C, h, w) for a batch.
        logvar: The logarithm of the variance, of the same shape; None: the mean itself is trained on.
    """

    mean: torch.Tensor
    logvar: torch.Tensor | None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def sample(self, generator: torch.Generator | None) -> torch.Tensor:
        """A sample; the mean without a generator or a variance. The noise is made on the generator's device."""
        if generator is None or self.logvar is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device).to(self.mean.device)
        return self.mean + (0.5 * self.logvar.clamp(-30, 20)).exp() * noise


def latent_key(digest: str, framing: Framing, background: str, vae: str) -> str:
    """The cache key of the latents of one image.

    Args:
        digest: Of the image file.
        framing: Resize, crop and mirroring.
        background: The colour on which transparent images are composed.
        vae: The digest of the VAE.

    Returns:
        A SHA-256 in hex.
    """
    geometry = (framing.resized, framing.top, framing.left, framing.target_size, framing.flip)
    return hashlib.sha256(json.dumps([LAYOUT, digest, geometry, background, vae]).encode()).hexdigest()


def reference_key(digest: str, size: tuple[int, int], area: int | None, vae: str, *, flip: bool) -> str:
    """The cache key of the latents of a reference image.

    Args:
        digest: Of the image file.
        size: (h, w) at which the VAE sees it.
        area: In pixels, to which it was scaled down first; None: it was not.
        vae: The digest of the VAE.
        flip: Whether it is mirrored.

    Returns:
        A SHA-256 in hex.
    """
    return hashlib.sha256(json.dumps([LAYOUT, "reference", digest, size, area, flip, vae]).encode()).hexdigest()


class LatentCache:
    """Keeps latents in a folder, one file each, or in memory if no folder is given.

    It is of use for framings that recur (a centre crop, mirrored or not); a random crop has a new key every time.

    Args:
        folder: Where the files are kept, or None.
    """

    def __init__(self, folder: str | Path | None = None):
        self.files = TensorCache(folder) if folder is not None else None
        self.memory: dict[str, Latents] = {}

    @property
    def bytes_per_cell(self) -> float | None:
        """The main memory of a latent pixel with all of its channels, on average; None: there are none."""
        size = sum(tensor.nbytes for found in self.memory.values() for tensor in found.tensors.values())
        cells = sum(found.mean.shape[-2] * found.mean.shape[-1] for found in self.memory.values())
        return size / cells if cells else None

    def has(self, key: str) -> bool:
        """Whether latents of this key are kept; those in a file may turn out to be damaged when they are read."""
        return key in self.memory if self.files is None else self.files.has(key)

    def report(self, keys: Iterable[str]) -> None:
        """Warns of latents in files that were computed under other circumstances."""
        if self.files is not None:
            self.files.report(keys, "latents")

    def get(self, key: str, compute: Callable[[], Latents], source: object = "") -> Latents:
        """The latents with this key, computed if they are missing or damaged.

        Args:
            key: From `latent_key`.
            compute: Returns the latents, on any device.
            source: The image, for messages.

        Returns:
            The latents, on the CPU.

        Raises:
            ValueError: The computed latents are not finite, as happens with some VAEs in fp16.
        """
        if self.files is not None and (tensors := self.files.read(key, ("mean",))) is not None:
            return Latents(tensors["mean"], tensors.get("logvar"))
        if key in self.memory:
            return self.memory[key]
        computed = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().tensors.items()}
        latents = Latents(computed["mean"], computed.get("logvar"))
        if not all(bool(tensor.isfinite().all()) for tensor in computed.values()):
            raise ValueError(f"the VAE returns values that are not finite for {source or key}: encode in float32")
        if self.files is None:
            self.memory[key] = latents
        else:
            self.files.write(key, latents.tensors)
        return latents

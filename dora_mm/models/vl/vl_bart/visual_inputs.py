"""Visual tokens of images and clips, read from precomputed features or encoded by a vision tower."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_mm.config.models import VisionConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.seen import SeenFiles
from dora_mm.data.vl.example import stem
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.vl.towers.tower import load_tower

NUM_FRAMES = 64  # per clip
CACHE_BYTES = 2**31  # of visual tokens, in main memory


class VisionEncoder(nn.Module):
    """Gives the visual tokens of images and clips.

    Args:
        config: The `vision` section.
        seed: Seed of a tower's random weights.
        trained: The tower is adapted, so its outputs must not be cached from one step to the next.

    Attributes:
        tower: The vision tower; None if precomputed features are read.
        features: The precomputed features; None if the tower encodes the images.
        files: Knows the content of images and features that were read before.

    Raises:
        ValueError: The features or the tower cannot be loaded; the message names the key.
    """

    def __init__(self, config: VisionConfig, *, seed: int = 0, trained: bool = False):
        super().__init__()
        paths = [resolve_path(path, "vision.features") for path in config.features]
        self.feature_paths = ", ".join(map(str, paths))  # for messages
        self.files = SeenFiles()
        self.features = open_features(paths, self.files) if paths else None
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.tower = None if self.features is not None else load_tower(config)
        self.trained = trained
        self._cache: OrderedDict[Path, Tensor] = OrderedDict()  # least recently used first

    @property
    def feature_dim(self) -> int:
        """D, the number of channels of a visual token."""
        if self.features is not None:
            return self.features.dim
        assert self.tower is not None
        return self.tower.feature_dim

    @property
    def device(self) -> torch.device:
        """The device of the tower, which must exist."""
        assert self.tower is not None
        return next(self.tower.parameters()).device

    @property
    def identity(self) -> str:
        """Digest of all that the tokens depend on (weights, layers, preprocessing); empty if feature files lack it."""
        source = self.tower if self.features is None else self.features
        assert source is not None
        return source.identity

    def check_rows(self, table: ExampleTable) -> ExampleTable:
        """Keeps the rows of a table whose images have precomputed features; all rows if a tower encodes them.

        Raises:
            ValueError: No image has features, or one has none and the table's `on_bad_data` is "stop".
        """
        features = self.features
        if features is None:
            return table
        return table.with_images(lambda name: name if stem(name) in features else None, self.feature_paths)

    def encode(self, images: Sequence[Sequence[str]], folder: str | None) -> Tensor:
        """Visual tokens of a batch of images.

        Args:
            images: B rows of N image names each.
            folder: The folder of the images; not used if precomputed features are read.

        Returns:
            (B, N, S, D).

        Raises:
            ValueError: `folder` is None and a tower has to encode, an image cannot be read, or features have different
                shapes.
        """
        names = list(dict.fromkeys(name for row in images for name in row))
        if self.features is not None:
            found = {name: self.features[stem(name)] for name in names}
        else:
            found = self._encode_named(names, folder)
        sizes = {tuple(tokens.shape): name for name, tokens in found.items()}
        if len(sizes) > 1:
            (one, a), (other, b) = list(sizes.items())[:2]
            raise ValueError(f"images of a batch have features of different shapes: {a} {one}, {b} {other}")
        return torch.stack([torch.stack([found[name] for name in row]) for row in images])

    def digest(self, name: str, folder: str | None) -> str:
        """The digest of an image, or of its features.

        Raises:
            OSError: The image cannot be read.
            ValueError: The features cannot be read.
        """
        return (
            self.files.digest(image_path(folder, name)) if self.features is None else self.features.digest(stem(name))
        )

    def encode_clips(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Visual tokens of a batch of clips, each resized to 64 frames (see `resize_frames`).

        Args:
            names: B clips.

        Returns:
            Features (B, 1, 64, D) and the mask of the frames (B, 64), 0 for padding.

        Raises:
            ValueError: No precomputed features are configured.
        """
        if self.features is None:
            raise ValueError(
                "vision.features is missing: clips need precomputed features, a vision tower encodes only images"
            )
        frames, masks = zip(*(resize_frames(self.features[stem(name)], NUM_FRAMES) for name in names), strict=True)
        return torch.stack(frames)[:, None], torch.stack(masks)

    def _encode_named(self, names: list[str], folder: str | None) -> dict[str, Tensor]:
        if folder is None:
            raise ValueError("data: a source without images needs vision.features, its precomputed features")
        paths = {name: image_path(folder, name) for name in names}
        if self.trained:
            return dict(zip(names, self._tokens(list(paths.values())), strict=True))
        for path in paths.values():
            # Cached tokens must not depend on their first use, which is another one after a resume: on its precision,
            # and on the batch, which changes the last bits.
            if path not in self._cache:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    self._cache[path] = self._tokens([path])[0].cpu()
        found = {name: self._cache[path] for name, path in paths.items()}
        for path in paths.values():
            self._cache.move_to_end(path)
        size = next(iter(found.values())).nbytes
        while len(self._cache) > max(CACHE_BYTES // size, len(paths)):
            self._cache.popitem(last=False)
        return found

    def _tokens(self, paths: list[Path]) -> Tensor:
        assert self.tower is not None
        pixels = torch.stack([self.tower.preprocess(load_rgb(path, "white", self.files.read)) for path in paths])
        return self.tower(pixels.to(self.device))


def resize_frames(features_TD: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Resizes a clip to a number of frames: a short clip is padded with zeros, a long one max-pooled adaptively.

    Args:
        features_TD: Features of T frames (T, D).
        frames: The number of frames wanted.

    Returns:
        Features (frames, D) and mask (frames,), 0 for padding.
    """
    length = len(features_TD)
    if length > frames:
        return F.adaptive_max_pool1d(features_TD.T[None], frames)[0].T, torch.ones(frames, dtype=torch.long)
    return F.pad(features_TD, (0, 0, 0, frames - length)), (torch.arange(frames) < length).long()

"""Visual tokens of images and clips: from files of features, or from a vision tower that encodes the images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_mm.config.loader import resolve_path
from dora_mm.config.vl import VisionConfig
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import stem
from dora_mm.data.vl.tables import ExampleTable
from dora_mm.models.towers.tower import load_tower

NUM_FRAMES = 64  # of a clip
KEPT_BYTES = 2**31  # of pictures' tokens, in main memory
ENCODE_BATCH = 32


class VisionEncoder(nn.Module):
    """`encode` gives the tokens of a batch of images; `tower` is None where features are read from files.

    seed: of a tower's random weights. trained: the tower is adapted, so that nothing of it may be kept from one step to
        the next.
    """

    def __init__(self, config: VisionConfig, *, seed: int = 0, trained: bool = False):
        super().__init__()
        paths = [resolve_path(path, "vision.features") for path in config.features]
        self.places = ", ".join(map(str, paths))
        self.features = open_features(paths) if paths else None
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.tower = None if self.features is not None else load_tower(config)
        self.trained = trained
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()

    @property
    def feature_dim(self) -> int:
        if self.features is not None:
            return self.features.dim
        assert self.tower is not None
        return self.tower.feature_dim

    @property
    def device(self) -> torch.device:
        assert self.tower is not None
        return next(self.tower.parameters()).device

    @property
    def identity(self) -> str:
        """Changes with what the tokens depend on: weights, layers, preprocessing; empty where files do not tell it."""
        source = self.tower if self.features is None else self.features
        assert source is not None
        return source.identity

    def check(self, table: ExampleTable) -> ExampleTable:
        """The rows whose pictures have features, where features are read; ValueError or a warning for others."""
        features = self.features
        if features is None:
            return table
        return table.with_images(lambda name: name if stem(name) in features else None, self.places)

    def encode(self, images: Sequence[Sequence[str]], folder: str | None) -> Tensor:
        """(B, N, S, D) for rows of N picture names each, which lie in `folder` where a tower looks at them."""
        names = list(dict.fromkeys(name for row in images for name in row))
        if self.features is not None:
            found = {name: self.features[stem(name)] for name in names}
        else:
            found = self._seen(names, folder)
        sizes = {tuple(tokens.shape): name for name, tokens in found.items()}
        if len(sizes) > 1:
            (one, a), (other, b) = list(sizes.items())[:2]
            raise ValueError(f"pictures of a batch have features of different shapes: {a} {one}, {b} {other}")
        return torch.stack([torch.stack([found[name] for name in row]) for row in images])

    def encode_clips(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, 1, 64, D) and the frames' mask (B, 64), 0 for padding: clips of other lengths are resized."""
        if self.features is None:
            raise ValueError("vision.features is missing: clips are read as features, not as pictures")
        frames, masks = zip(*(resize_frames(self.features[stem(name)], NUM_FRAMES) for name in names), strict=True)
        return torch.stack(frames)[:, None], torch.stack(masks)

    def _seen(self, names: list[str], folder: str | None) -> dict[str, Tensor]:
        if folder is None:
            raise ValueError("data: a source without images needs vision.features, where its features lie")
        paths = {name: resolve_path(folder, "images") / name for name in names}
        if self.trained:
            return dict(zip(names, self._tokens(list(paths.values())), strict=True))
        new = [path for path in paths.values() if path not in self._kept]
        for start in range(0, len(new), ENCODE_BATCH):
            part = new[start : start + ENCODE_BATCH]
            # One precision whoever asks first, so that what is kept does not depend on it.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._kept.update(zip(part, self._tokens(part).cpu(), strict=True))
        found = {name: self._kept[path] for name, path in paths.items()}
        for path in paths.values():
            self._kept.move_to_end(path)
        size = next(iter(found.values())).nbytes
        while len(self._kept) > max(KEPT_BYTES // size, len(paths)):
            self._kept.popitem(last=False)
        return found

    def _tokens(self, paths: list[Path]) -> Tensor:
        assert self.tower is not None
        pixels = torch.stack([self.tower.preprocess(load_rgb(path, "white")) for path in paths])
        return self.tower(pixels.to(self.device))


def resize_frames(features_TD: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """(frames, D) and its mask (frames,): zeros after a short clip, adaptive maxima of a long one."""
    length = len(features_TD)
    if length > frames:
        return F.adaptive_max_pool1d(features_TD.T[None], frames)[0].T, torch.ones(frames, dtype=torch.long)
    return F.pad(features_TD, (0, 0, 0, frames - length)), (torch.arange(frames) < length).long()

"""Computes what a vision tower says about every picture of some folders, once, into a folder of features.

Run again, it goes on: pictures that are there already, and have not changed since, are not computed again.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dora_mm.config.loader import resolve_path
from dora_mm.config.vl import ExtractFeaturesConfig
from dora_mm.data.features.folder import FeatureWriter
from dora_mm.data.features.images import ImageFiles
from dora_mm.data.images.pixels import SUFFIXES
from dora_mm.data.vl.example import stem
from dora_mm.models.towers.tower import VisionTower, load_tower
from dora_mm.utils.devices import default_device

log = logging.getLogger(__name__)
NUM_READERS = 8  # processes that decode while a GPU computes; on a CPU they would only take its time


def main(config: ExtractFeaturesConfig, *, resume: Path | None = None) -> None:
    paths = find_pictures(config)
    tower = load_tower(config.vision).to(default_device())
    folder = Path(config.output).expanduser()
    shape = (tower.num_tokens, tower.feature_dim)
    dtype = getattr(torch, config.dtype)
    size = len(paths) * shape[0] * shape[1] * dtype.itemsize
    log.info("%s: %d x %d for each of %d pictures, %.0f MB in %s", tower.name, *shape, len(paths), size / 1e6, folder)
    with FeatureWriter(folder, tower.identity, shape, dtype, tower.name) as writer:
        num_before = len(writer)
        num_computed, problems = extract(config, tower, writer, paths)
    if problems:
        log.warning("%d pictures were left out:\n  %s", len(problems), "\n  ".join(problems))
    log.info("%d computed, %d were there already: %s", num_computed, num_before, folder)


def find_pictures(config: ExtractFeaturesConfig) -> list[Path]:
    """All picture files in the folders and below. Raises ValueError where there are none, or two of the same name."""
    found: dict[str, Path] = {}
    num_others = 0
    for folder in config.images:
        root = resolve_path(folder, "images")
        if not root.is_dir():
            raise ValueError(f"images: {root} is not a folder")
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not pictures:
            raise ValueError(f"images: {root} holds no pictures ({', '.join(SUFFIXES)})")
        num_others += len(files) - len(pictures)
        for path in pictures:
            if (twin := found.setdefault(stem(path.name), path)) != path:
                raise ValueError(f"images: {twin} and {path} have the same name, by which features are found")
    if num_others:
        log.info("%d files are no pictures, and left out", num_others)
    return list(found.values())


def extract(
    config: ExtractFeaturesConfig, tower: VisionTower, writer: FeatureWriter, paths: list[Path]
) -> tuple[int, list[str]]:
    """Adds what is missing; returns how many pictures were computed, and what was wrong with others."""
    device = next(tower.parameters()).device
    readers = 0 if device.type == "cpu" else min(NUM_READERS, os.cpu_count() or 1)
    pictures = ImageFiles(paths, tower.preprocess, dict(writer.digests))
    batches: Any = DataLoader(pictures, config.batch_size, collate_fn=list, num_workers=readers)
    num_computed, problems = 0, []
    with tqdm(total=len(paths), desc="features", unit="picture", disable=None) as bar:
        for batch in batches:
            problems += [picture.problem for picture in batch if picture.problem]
            if problems and config.on_bad_data == "stop":
                raise ValueError(f"images: {problems[0]}")
            new = [picture for picture in batch if picture.pixels is not None]
            if new:
                with torch.inference_mode():
                    features = tower(torch.stack([picture.pixels for picture in new]).to(device))
                for picture, features_SD in zip(new, features, strict=True):
                    writer.add(picture.name, picture.digest, features_SD)
            num_computed += len(new)
            bar.update(len(batch))
    return num_computed, problems

"""Computes the features of all images in some folders with a vision tower.

It can be interrupted and run again: images whose features exist, and that have not changed since, are skipped.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dora_mm.config.paths import resolve_path
from dora_mm.config.vl import ExtractFeaturesConfig
from dora_mm.data.features.folder import FeatureWriter
from dora_mm.data.features.images import ImageFiles
from dora_mm.data.images.decoders import SUFFIXES
from dora_mm.data.vl.example import stem
from dora_mm.models.vl.towers.tower import VisionTower, load_tower
from dora_mm.utils.devices import default_device
from dora_mm.utils.folders import FOLLOW, Links, check_entry
from dora_mm.utils.home import expanded
from dora_mm.utils.lock import only_writer
from dora_mm.utils.progress import Progress

log = logging.getLogger(__name__)
NUM_READERS = 8  # processes that decode images while a GPU computes; on a CPU they would only slow it down


def main(config: ExtractFeaturesConfig, *, resume: Path | None = None) -> None:
    """Computes the features that are missing.

    Writes to the folder `output`: the features of every image by the stem of its file name, and the identity of the
    tower (see `FeatureWriter`).

    Args:
        config: The config.
        resume: Unused: the same command continues an interrupted run.

    Raises:
        ValueError: A folder contains no images, two images have the same stem, an image cannot be read while
            `on_bad_data` is `stop`, or `output` holds features of another tower or dtype, or has another writer.
    """
    paths = find_images(config)
    tower = load_tower(config.vision).to(default_device())
    folder = expanded(config.output)
    shape = (tower.num_tokens, tower.feature_dim)
    dtype = getattr(torch, config.dtype)
    size = len(paths) * shape[0] * shape[1] * dtype.itemsize
    log.info("%s: %d x %d for each of %d images, %.0f MB in %s", tower.name, *shape, len(paths), size / 1e6, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder), FeatureWriter(folder, tower.identity, shape, dtype, tower.name) as writer:
        num_before = len(writer)
        num_computed, problems = extract(config, tower, writer, paths)
    if problems:
        log.warning("%d images were skipped:\n  %s", len(problems), "\n  ".join(problems))
    log.info("%d computed, %d existed already: %s", num_computed, num_before, folder)


def find_images(config: ExtractFeaturesConfig) -> list[Path]:
    """Finds all image files in the folders and their subfolders.

    Raises:
        ValueError: A folder does not exist or contains no images, or two images have the same stem.
    """
    found: dict[str, Path] = {}
    num_others = 0
    for folder in config.images:
        root = resolve_path(folder, "images")
        if not root.is_dir():
            raise ValueError(f"images: {root} is not a folder")
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        links = Links(config.follow_links, FOLLOW)
        images = [check_entry(path, root, links) for path in files if path.suffix.lower() in SUFFIXES]
        if not images:
            raise ValueError(f"images: {root} contains no images ({', '.join(SUFFIXES)})")
        num_others += len(files) - len(images)
        for path in images:
            if (other := found.setdefault(stem(path.name), path)) != path:
                raise ValueError(f"images: {other} and {path} have the same name, by which features are looked up")
    if num_others:
        log.info("%d files are not images and are skipped", num_others)
    return list(found.values())


def extract(
    config: ExtractFeaturesConfig, tower: VisionTower, writer: FeatureWriter, paths: list[Path]
) -> tuple[int, list[str]]:
    """Computes and writes the missing features.

    Returns:
        The number of images that were computed, and one message for every image that could not be read.

    Raises:
        ValueError: An image cannot be read and `on_bad_data` is `stop`.
    """
    device = next(tower.parameters()).device
    readers = 0 if device.type == "cpu" else min(NUM_READERS, os.cpu_count() or 1)
    images = ImageFiles(paths, tower.preprocess, dict(writer.digests))
    batches: Any = DataLoader(images, config.batch_size, collate_fn=list, num_workers=readers)
    num_computed, problems = 0, []
    with Progress("features", len(paths), "images") as progress:
        for batch in batches:
            problems += [image.problem for image in batch if image.problem]
            if problems and config.on_bad_data == "stop":
                raise ValueError(f"images: {problems[0]}")
            new = [image for image in batch if image.pixels is not None]
            if new:
                with torch.inference_mode():
                    features = tower(torch.stack([image.pixels for image in new]).to(device))
                for image, features_SD in zip(new, features, strict=True):
                    writer.add(image.name, image.digest, features_SD)
            num_computed += len(new)
            progress.advance(len(batch))
    return num_computed, problems

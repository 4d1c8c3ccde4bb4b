"""Reference images: what a model that edits sees beside the prompt, none to several for each training image.

Metadata files name them, or they lie in folders of their own: `a.png` in one, or `a_1.png` and `a_2.png`, for `a.png`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dora_mm.data.images.buckets import Size
from dora_mm.data.images.captions import is_image
from dora_mm.data.images.pixels import load_rgb, load_rgba
from dora_mm.data.seen import read_as
from dora_mm.utils.digest import file_digest

BACKGROUND = "white"  # behind transparent references, in training as in sampling
NUMBERED = re.compile(r"(.+)_(\d+)")


class ReferenceImage(NamedTuple):
    """A reference image that has been decoded once."""

    path: Path
    size: Size  # (h, w), upright
    digest: str  # SHA-256 of the file


def named_alike(images: Sequence[Path], root: Path) -> list[Path]:
    """The folders in and beside a folder that have an image for each of its images: they may be references."""
    stems = {image.relative_to(root).with_suffix("") for image in images}
    folders = [path for parent in (root, root.parent) for path in sorted(parent.iterdir()) if path.is_dir()]
    found = []
    for folder in folders:
        if folder != root and stems <= {Path(name).with_suffix("") for name in os.listdir(folder) if is_image(name)}:
            found.append(folder)
    return found


def read_reference(path: Path) -> ReferenceImage:
    """Decodes a reference image.

    Raises:
        ValueError: As in `load_rgb`.
    """
    image = load_rgb(path, BACKGROUND)
    return ReferenceImage(path, (image.height, image.width), file_digest(path))


def load_reference(reference: ReferenceImage, *, alpha: bool = False) -> Image.Image:
    """The image of a reference, upright, as RGB on white or with its alpha.

    Raises:
        ValueError: The file is not the one that was read before, or as in `load_rgb`.
    """
    read = partial(read_as, digest=reference.digest)
    return load_rgba(reference.path, read) if alpha else load_rgb(reference.path, BACKGROUND, read)


class ReferenceFiles:
    """The files of the references of a folder of images.

    Args:
        images: The images.
        listed: The references that metadata files name, by image.
        folders: The folders of references, each with its files, in the order of the references that they have.
        root: The folder of the images.
    """

    def __init__(
        self,
        images: Sequence[Path],
        listed: Mapping[Path, tuple[Path, ...]],
        folders: Iterable[tuple[Path, Iterable[Path]]],
        root: Path,
    ):
        self._listed = {image: paths for image, paths in listed.items() if paths}
        self._found: dict[Path, list[Path]] = {}  # by the path of the image without its suffix
        self._orphans: list[Path] = []
        self._images = images
        stems = {image.with_suffix("") for image in images}
        for folder, files in folders:
            numbered: dict[Path, list[tuple[int, Path]]] = {}
            for file in files:
                if is_image(file.name):
                    stem = (root / file.relative_to(folder)).with_suffix("")
                    self._sort(file, stem, stems, numbered)
            for stem, found in numbered.items():
                self._found.setdefault(stem, []).extend(path for _, path in sorted(found))

    def _sort(self, file: Path, stem: Path, stems: set[Path], numbered: dict[Path, list[tuple[int, Path]]]) -> None:
        """Finds the image of a file: the one with its name, else the one with its name without a number at the end."""
        match = NUMBERED.fullmatch(stem.name)
        if stem in stems:
            numbered.setdefault(stem, []).append((-1, file))
        elif match and stem.with_name(match[1]) in stems:
            numbered.setdefault(stem.with_name(match[1]), []).append((int(match[2]), file))
        else:
            self._orphans.append(file)

    def of_image(self, image: Path) -> tuple[Path, ...]:
        """The references of an image, in their order; empty where it has none."""
        return self._listed.get(image) or tuple(self._found.get(image.with_suffix(""), ()))

    def problems(self, key: str) -> list[str]:
        """What is wrong with the files, one sentence each; `key` is that of the config which names their folders."""
        both = [image for image in self._listed if image.with_suffix("") in self._found]
        found = [f"{image.name} has references in a metadata file and in {key}: keep one of both" for image in both]
        if self._orphans:
            names = ", ".join(path.name for path in self._orphans[:8]) + (", ..." if len(self._orphans) > 8 else "")
            found.append(f"{len(self._orphans)} files of {key} belong to no image ({names}): rename or remove them")
        return found

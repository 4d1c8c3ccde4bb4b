"""Image files as inputs of a vision tower, to compute their features once."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dora_mm.data.features.folder import image_digest
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import stem


class PreparedImage(NamedTuple):
    """One image file, ready for the vision tower.

    Attributes:
        name: The name under which its features are stored.
        digest: Of the file's content; "" if it cannot be read.
        pixels: The preprocessed image, (C, h, w); None if its features exist already or if there is a problem.
        problem: Why the file cannot be used, None if it can.
    """

    name: str
    digest: str
    pixels: Tensor | None
    problem: str | None = None


class ImageFiles(Dataset):
    """The images to encode, decoded and preprocessed one at a time; usable from worker processes.

    Args:
        paths: The image files.
        preprocess: The tower's preprocessing of an RGB image.
        done: The digests of the images that have features already, by name.
    """

    def __init__(self, paths: list[Path], preprocess: Callable[[Image.Image], Tensor], done: dict[str, str]):
        self.paths, self.preprocess, self.done = paths, preprocess, done

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> PreparedImage:
        path = self.paths[index]
        name = stem(path.name)
        try:
            digest = image_digest(path)
            if self.done.get(name) == digest:
                return PreparedImage(name, digest, None)
            return PreparedImage(name, digest, self.preprocess(load_rgb(path)))
        except OSError as error:
            return PreparedImage(name, "", None, f"{path} cannot be read: {error.strerror}")
        except ValueError as error:
            return PreparedImage(name, "", None, str(error))

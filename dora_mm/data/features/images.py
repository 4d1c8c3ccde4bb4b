"""Image files as the inputs of a vision tower, for computing their features once."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dora_mm.data.features.folder import picture_digest
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import stem


class PreparedImage(NamedTuple):
    """One image file, ready for the vision tower.

    pixels: None where the features are there already, or where `problem` says what is wrong with the file."""

    name: str
    digest: str
    pixels: Tensor | None
    problem: str | None = None


class ImageFiles(Dataset):
    """The image files to encode, decoded and preprocessed one by one; readable from worker processes."""

    def __init__(self, paths: list[Path], preprocess: Callable[[Image.Image], Tensor], done: dict[str, str]):
        self.paths, self.preprocess, self.done = paths, preprocess, done

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> PreparedImage:
        path = self.paths[index]
        name = stem(path.name)
        try:
            digest = picture_digest(path)
            if self.done.get(name) == digest:
                return PreparedImage(name, digest, None)
            return PreparedImage(name, digest, self.preprocess(load_rgb(path)))
        except OSError as error:
            return PreparedImage(name, "", None, f"{path} cannot be read: {error.strerror}")
        except ValueError as error:
            return PreparedImage(name, "", None, str(error))

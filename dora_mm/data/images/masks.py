"""Masks: how much each place of an image counts in the loss; white is 1, black 0.

They are found by their names: beside cat.jpg as cat.mask.png, or as OneTrainer writes it, cat-masklabel.png; or in a
folder of their own under the names of the images, as kohya's scripts, ai-toolkit and diffusion-pipe have them.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dora_mm.data.images.buckets import Framing, Size
from dora_mm.data.images.captions import is_image
from dora_mm.data.images.pixels import Read, crop_box, load_alpha, load_rgb
from dora_mm.utils.digest import file_digest

ENDINGS = (".mask", "-masklabel")  # of the name of a mask before its suffix: ours, and OneTrainer's
CONDITION = "-condlabel"  # likewise of an image that OneTrainer conditions a model on
CONTROLS = "_controls"  # where ai-toolkit puts the control images that it makes: depth maps, edges
MASK_FOLDER = re.compile(r"(.*)[_ .-]masks?|masks?", re.IGNORECASE)  # how people name a folder of masks
ALPHA = "alpha"  # stands for the digest of a mask that is the image's own transparency
MOST_STRETCHED = 0.02  # by which the ratio of a mask's sides may differ from its image's, for rounding


class MaskFile(NamedTuple):
    """The file of a mask."""

    path: Path
    ending: str = ""  # what follows the image's name in its own, such as .mask.png; empty: it is in a folder of masks

    @property
    def red(self) -> bool:
        """Whether its red channel counts, as in kohya's scripts and diffusion-pipe, and not its brightness."""
        return not self.ending


class ImagesByKind(NamedTuple):
    """The image files of a folder by what they are, which their names say."""

    images: set[Path]  # what is trained on
    masks: dict[Path, list[MaskFile]]  # those beside images, by the path of the image without its suffix
    conditions: set[Path]  # what OneTrainer and ai-toolkit condition a model on


def by_kind(files: Iterable[Path]) -> ImagesByKind:
    """Sorts the image files among files by what they are; other files are left out."""
    found = ImagesByKind(set(), {}, set())
    for file in sorted(files):
        if not is_image(file.name):
            continue
        if image := masked_image(file):
            found.masks.setdefault(image, []).append(MaskFile(file, file.name[len(image.name) :]))
        elif file.stem.lower().endswith(CONDITION) or file.parent.name == CONTROLS:
            found.conditions.add(file)
        else:
            found.images.add(file)
    return found


def masked_image(file: Path) -> Path | None:
    """The path without suffix of the image whose mask a file beside it is, by its name; None for other files."""
    for ending in ENDINGS:
        if file.stem.lower().endswith(ending) and len(file.stem) > len(ending):
            return file.with_name(file.stem[: -len(ending)])
    return None


class MaskFiles:
    """The masks of the images of a folder.

    Args:
        by_image: Those beside the images, by the path of the image without its suffix.
        root: The folder of the images.
        folder: A folder of masks, each at the path of its image but for the suffix; None: there is none.
        files: All files in that folder.
    """

    def __init__(self, by_image: dict[Path, list[MaskFile]], root: Path, folder: Path | None, files: Iterable[Path]):
        self._found = {image: list(masks) for image, masks in by_image.items()}
        for path in files:
            if folder and is_image(path.name):
                image = (root / path.relative_to(folder)).with_suffix("")
                self._found.setdefault(image, []).append(MaskFile(path))

    def of_image(self, image: Path) -> MaskFile | None:
        """The mask of an image; None where it has none."""
        return next(iter(self._found.get(image.with_suffix(""), [])), None)

    def paths(self) -> set[Path]:
        """All files."""
        return {mask.path for masks in self._found.values() for mask in masks}

    def orphans(self, images: Iterable[Path]) -> list[Path]:
        """The masks of no image."""
        stems = {image.with_suffix("") for image in images}
        return sorted(mask.path for image, masks in self._found.items() if image not in stems for mask in masks)

    def ambiguous(self) -> list[str]:
        """The images with several masks, as sentences."""
        return [
            f"{image.name} has {len(masks)} masks ({', '.join(str(mask.path) for mask in masks)}): keep one"
            for image, masks in sorted(self._found.items())
            if len(masks) > 1
        ]


def folders_of_masks(images: Collection[Path]) -> dict[Path, Path]:
    """The folders that are masks of the images in another folder, as far as names tell it.

    Args:
        images: The images of a folder and its subfolders.

    Returns:
        The folder of the images by that of the masks.
    """
    stems: dict[Path, set[str]] = {}
    for path in images:
        stems.setdefault(path.parent, set()).add(path.stem)
    found = {}
    for folder, names in stems.items():
        if match := MASK_FOLDER.fullmatch(folder.name):
            folders = [folder.with_name(match[1])] if match[1] else []
            masked = next(
                (
                    folder_of_masks
                    for folder_of_masks in (*folders, folder.parent)
                    if names <= stems.get(folder_of_masks, set())
                ),
                None,
            )
            found |= {folder: masked} if masked else {}
    return found


def load_mask(image: Path, mask: MaskFile | None, read: Read = Path.read_bytes) -> Image.Image | None:
    """The mask of an image, upright, in float32 from 0 to 1; None if it has none.

    Args:
        image: The image file.
        mask: Its mask; None: its own transparency.
        read: Reads the file that has the mask.

    Raises:
        ValueError: The mask is broken, or black all over; the message names the file.
    """
    if mask is None:
        file, grey = image, load_alpha(image, read)
    else:
        file, rgb = mask.path, load_rgb(mask.path, "black", read)
        grey = rgb.getchannel("R") if mask.red else rgb.convert("L")
    if grey is None:
        return None
    values = np.asarray(grey, dtype=np.float32) / 255
    if not values.any():
        what = "transparent" if mask is None else "black"
        raise ValueError(f"{file} is {what} all over: nothing of the image would be trained: redraw or remove it")
    return Image.fromarray(values)


def check_mask(image: Path, size: Size, mask: MaskFile | None) -> bool:
    """Whether an image has a mask.

    Args:
        image: The image file.
        size: (h, w) of the image, upright.
        mask: As in `load_mask`.

    Raises:
        ValueError: As in `load_mask`; or the mask is of another shape than its image.
    """
    found = load_mask(image, mask)
    if found is None or mask is None:
        return found is not None
    stretched = (found.width * size[0]) / (found.height * size[1])
    if abs(stretched - 1) > MOST_STRETCHED:
        shapes = f"{found.width} x {found.height}, and its image {size[1]} x {size[0]}"
        raise ValueError(f"{mask.path} is {shapes}: it needs the same shape")
    return True


def mask_digest(image: Path, mask: MaskFile | None, size: Size, source: str | None) -> str:
    """Digest of the mask of an image, which is decoded once, so that a bad one stops a run at its start.

    Args:
        image: The image file.
        mask: The file of its mask; None: it has none.
        size: (h, w) of the image, upright.
        source: "file", "alpha", or None where masks are not used.

    Returns:
        SHA-256 of the file, "alpha", or nothing where the image has no mask, or it is not used.

    Raises:
        ValueError: As in `check_mask`.
    """
    if source == ALPHA:
        return ALPHA if check_mask(image, size, None) else ""
    if source is None or mask is None:
        return ""
    check_mask(image, size, mask)
    return file_digest(mask.path)


def no_masks(source: str) -> str:
    """The message that no image has a mask from a source."""
    if source == ALPHA:
        return "no image is transparent anywhere, and data.mask.source alpha takes the mask from that"
    by_image = " or ".join(f"cat{ending}.png" for ending in ENDINGS)
    return f"no image has a mask: that of cat.jpg is {by_image} beside it, or cat.png in the folder data.mask.folder"


def render_mask(mask: Image.Image, framing: Framing, size: Size) -> torch.Tensor:
    """The framed part of a mask, averaged over the area of each latent: (h, w), float32.

    Args:
        mask: From `load_mask`.
        framing: How its image is resized, cropped and mirrored.
        size: (h, w) of the latents.
    """
    part = mask.resize((size[1], size[0]), Image.Resampling.BOX, box=crop_box(mask, framing))
    values = torch.from_numpy(np.array(part, dtype=np.float32))
    return (values.flip(-1) if framing.flip else values).clamp(0, 1)

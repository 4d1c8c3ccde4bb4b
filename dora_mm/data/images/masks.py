"""Masks: how much each place of an image counts in the loss; white is 1, black 0."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dora_mm.data.images.buckets import Framing, Size
from dora_mm.data.images.pixels import Read, crop_box, load_alpha, load_rgb

ENDING = ".mask.png"  # of the mask of an image: cat.mask.png is that of cat.jpg
ALPHA = "alpha"  # stands for the digest of a mask that is the image's own transparency
MOST_STRETCHED = 0.02  # by which the ratio of a mask's sides may differ from its image's, for rounding


def mask_file(image: Path) -> Path:
    """Where the mask of an image is looked for."""
    return image.with_name(image.stem + ENDING)


def load_mask(image: Path, source: str, read: Read = Path.read_bytes) -> Image.Image | None:
    """The mask of an image, upright, in float32 from 0 to 1; None if it has none.

    Args:
        image: The image file.
        source: "file" or "alpha".
        read: Reads the file that has the mask.

    Raises:
        ValueError: The mask is broken, black all over, or of another shape than its image; the message names the file.
    """
    if source == ALPHA:
        file, grey = image, load_alpha(image, read)
    else:
        file = mask_file(image)
        grey = load_rgb(file, "black", read).convert("L") if file.exists() else None
    if grey is None:
        return None
    values = np.asarray(grey, dtype=np.float32) / 255
    if not values.any():
        what = "transparent" if source == ALPHA else "black"
        raise ValueError(f"{file} is {what} all over: nothing of the image would be trained: redraw or remove it")
    return Image.fromarray(values)


def check_mask(image: Path, size: Size, source: str) -> bool:
    """Whether an image has a mask.

    Args:
        image: The image file.
        size: (h, w) of the image, upright.
        source: As in `load_mask`.

    Raises:
        ValueError: As in `load_mask`.
    """
    mask = load_mask(image, source)
    if mask is None:
        return False
    stretched = (mask.width * size[0]) / (mask.height * size[1])
    if abs(stretched - 1) > MOST_STRETCHED:
        shapes = f"{mask.width} x {mask.height}, and its image {size[1]} x {size[0]}"
        raise ValueError(f"{mask_file(image)} is {shapes}: it needs the same shape")
    return True


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

"""Training images as the model could generate them at best: of its size, and through its VAE."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dora_mm.data.images.buckets import Framing, choose_bucket, frame
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.vae import decoded
from dora_mm.utils.progress import tracked


def reconstructed(model: ImageModel, images: Sequence[CaptionedImage], background: str) -> list[Image.Image]:
    """Brings images to the model's size, as a training does, and through its VAE.

    The losses of the VAE, and sizes in which the model does not generate, would tell generated images from the
    originals, however good they are.

    Args:
        model: The model.
        images: The images.
        background: What is behind transparent ones.
    """
    found = []
    for image in tracked(images, "training images", "images"):
        framing = frame(image.size, choose_bucket(image.size, model.resolution))
        found.append(through_vae(model, image.path, framing, background))
    return found


def through_vae(model: ImageModel, file: Path, framing: Framing, background: str = "white") -> Image.Image:
    """An image as a training frames it, through the model's VAE."""
    pixels: torch.Tensor = render(load_rgb(file, background), framing)
    return decoded(model.vae, model.encode_images(pixels[None]).mean)[0]

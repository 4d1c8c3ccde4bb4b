"""Training images as the model could generate them at best: of its size, and through its VAE."""

from collections.abc import Sequence

import torch
from PIL import Image

from dora_mm.data.images.buckets import choose_bucket, frame
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
        pixels: torch.Tensor = render(load_rgb(image.path, background), framing)
        found += decoded(model.vae, model.encode_images(pixels[None]).mean)
    return found

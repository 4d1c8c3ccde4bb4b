"""Basis for scoring an adapter of a custom style: its training images, prompts in their words, and an encoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.config.paths import resolve_model
from dora_mm.data.images.folder import CaptionedImage, contains_word, read_training_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.data.images.shared_words import PLACEHOLDER, example_prompts, shared_word
from dora_mm.data.images.wording import all_unchanged
from dora_mm.eval.images.clip import ClipSimilarity
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.own_style import embedded_vectors
from dora_mm.eval.images.timm_encoder import TimmEncoder

INSTANCE_PROMPT = "data.instance_prompt"  # the source of the caption of images without one
EMBEDDED = (
    "encoder: EfficientNet-Lite0, trained on photographs of things; it reads no prompts, and its cosines are high for "
    "all images: compare rows, not numbers. clip_model or timm_model (DINOv2) names a better one."
)


class Vectors(NamedTuple):
    """An image encoder: functions to unit vectors of images and, with CLIP, of texts."""

    of_images: Callable[[Sequence[Image.Image]], np.ndarray]
    of_texts: Callable[[Sequence[str]], np.ndarray] | None
    about: str


def vectors_by(device: torch.device, clip_model: str | None = None, timm_model: str | None = None) -> Vectors:
    """The encoder that one of the keys names, or the embedded one.

    Raises:
        ValueError: It cannot be loaded.
    """
    if clip_model is not None:
        clip = ClipSimilarity(resolve_model(clip_model, "clip_model"), device, "clip_model")
        return Vectors(clip.embed_images, clip.embed_texts, f"encoder: {clip_model}")
    if timm_model is not None:
        encoder = TimmEncoder(resolve_model(timm_model, "timm_model"), device)
        return Vectors(encoder.embed_images, None, f"encoder: {timm_model}, which reads no prompts")
    return Vectors(partial(embedded_vectors, Encoder(device)), None, EMBEDDED)


def images_of_training(data: DataConfig) -> list[CaptionedImage]:
    """The images that are trained on, with or without captions, which generated ones are compared with.

    Raises:
        ValueError: They cannot be read.
    """
    changes = {"instance_prompt": PLACEHOLDER, "placeholder": None, "unused_captions": "stop"}
    images = read_training_images(data.model_copy(update=changes))
    return hold_out(images, data)[0] if data.valid and data.valid.share else images


def trigger_word(trained: TrainDiffusionConfig | None, images: Sequence[CaptionedImage]) -> str | None:
    """The word for the style that every caption of the training has; None: there is none.

    Args:
        trained: The config of the training, if it is known.
        images: Its images, read by `images_of_training`, which leaves the instance prompt to this function.
    """
    data = trained.data if trained else None
    prompt = (data.instance_prompt if data else None) or ""
    own = [image._replace(caption=prompt) if image.source == INSTANCE_PROMPT else image for image in images]
    captions = [text for image in own for text in all_unchanged(image, data.captions if data else None)]
    word = (data.placeholder if data else None) or shared_word(captions)
    return word if word and all(contains_word(text, word) for text in captions) else None


def prompts_in_style(trained: TrainDiffusionConfig | None, images: Sequence[CaptionedImage]) -> list[str]:
    """The prompts of a training's samples, and some for things that no caption names, worded as the captions are."""
    captions = [image.caption for image in images]
    word = trained.data.placeholder if trained else shared_word(captions)
    own = trained.sample.prompts if trained else ()
    return list(dict.fromkeys([*own, *example_prompts(captions, word)]))

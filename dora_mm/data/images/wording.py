"""The caption that a training reads for an image: a function of (captions, settings, seed, epoch, image) alone."""

from collections.abc import Sequence

import torch

from dora_mm.config.images import CaptionConfig
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.data.syntax import alternatives
from dora_mm.utils.randomness import generator

FIXED = "|||"  # what stands before the first and behind the second one stays where it is, as in kohya's trainers


def rendered(image: CaptionedImage, config: CaptionConfig | None, seed: int, epoch: int) -> str:
    """The caption of an image in an epoch: one of several, with its tags in another order, and some of them dropped.

    Args:
        image: The image with all of its captions.
        config: The `data.captions` section; None: captions stay as they are, and one of several is drawn.
        seed: The seed of the run.
        epoch: The number of the epoch.
    """
    captions = (image.caption, *image.more)
    if config is None and len(captions) == 1:
        return image.caption
    stream = generator(seed, epoch, f"caption of {image.digest}")
    text = captions[int(torch.randint(len(captions), (), generator=stream))]
    if config is None:
        return text
    chosen = int(torch.randint(2**31, (), generator=stream))
    return _framed(text, config, chosen, stream)


def unchanged(image: CaptionedImage, config: CaptionConfig | None) -> str:
    """The first caption of an image with its prefix and suffix, where nothing is drawn."""
    return image.caption if config is None else _framed(image.caption, config, 0)


def all_unchanged(image: CaptionedImage, config: CaptionConfig | None) -> list[str]:
    """As `unchanged`, of each caption of an image."""
    return [unchanged(image._replace(caption=text), config) for text in (image.caption, *image.more)]


def _framed(text: str, config: CaptionConfig, chosen: int, stream: torch.Generator | None = None) -> str:
    """A caption between prefix and suffix, which stay; without a stream, its tags do so, too."""
    parts = [config.prefix or "", text, config.suffix or ""]
    if config.alternatives:
        parts = [alternatives(part, chosen + number) for number, part in enumerate(parts)]
    if stream is None or not (config.shuffle or config.tag_dropout):
        parts[1] = _in_order(parts[1])
    else:
        parts[1] = _shuffled(parts[1], config, stream)
    return " ".join(part for part in parts if part)


def _in_order(text: str) -> str:
    return ", ".join(tag for part in text.split(FIXED) for tag in _tags(part)) if FIXED in text else text


def _shuffled(text: str, config: CaptionConfig, stream: torch.Generator) -> str:
    head, flexible, tail = fixed_and_flexible(text, config.keep)
    order = torch.randperm(len(flexible), generator=stream).tolist() if config.shuffle else range(len(flexible))
    stays = (torch.rand(len(flexible), generator=stream) >= config.tag_dropout).tolist()
    return ", ".join([*head, *(flexible[index] for index in order if stays[index]), *tail])


def fixed_and_flexible(text: str, keep: int) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """The tags of a caption that stay first, those that may move or be dropped, and those that stay last.

    Args:
        text: Tags with commas between them; `|||` between these three parts.
        keep: How many stay first, of a caption without `|||`.
    """
    head, *others = (_tags(part) for part in text.split(FIXED, 2))
    if not others:
        return head[:keep], head[keep:], []
    return head, others[0], others[1] if len(others) > 1 else []


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]

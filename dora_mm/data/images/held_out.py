"""Images that are not trained on, by which a training is validated."""

import logging
from collections.abc import Sequence

from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import CaptionedImage, read_captioned_images, read_images

log = logging.getLogger(__name__)


def hold_out(images: Sequence[CaptionedImage], data: DataConfig) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Splits images into those that are trained on and those that are held out.

    A share is taken in an order that the content of the images decides, and equal images stay together: the choice
    depends neither on names nor on a seed.

    Args:
        images: The images of `data.folder`, or of the folders of role train.
        data: The `data` section, whose `valid`, or folders of role validate, say what is held out.

    Returns:
        The images to train on, and the held-out ones, each in the order of their folder.

    Raises:
        ValueError: All images are equal, so that none can be held out; or the folder of held-out images cannot be used.
    """
    valid = data.valid
    if valid is None:
        held_out = read_images(data, "validate")
        _warn_of_both(images, held_out, "folders of role validate")
        return list(images), held_out
    if valid.folder is not None:
        held_out = read_captioned_images(
            valid.folder,
            instance_prompt=data.instance_prompt,
            subfolders=data.subfolders,
            unused_captions=data.unused_captions,
            key="data.valid.folder",
            lines=data.captions is not None and data.captions.lines,
            masks=data.mask and data.mask.source,
            links=data.links,
        )
        _warn_of_both(images, held_out, valid.folder)
        return list(images), held_out[: valid.limit]
    assert valid.share is not None
    digests = sorted({image.digest for image in images})
    if len(digests) < 2:
        name = data.folder or "data.folders"
        raise ValueError(f"data.valid.share: {name} has a single image, so none can be held out")
    wanted = min(max(1, round(valid.share * len(digests))), valid.limit or len(digests), len(digests) - 1)
    chosen = set(digests[:wanted])
    return [image for image in images if image.digest not in chosen], [i for i in images if i.digest in chosen]


def _warn_of_both(images: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage], name: str) -> None:
    if both := {image.digest for image in images} & {image.digest for image in held_out}:
        log.warning("%d of the images in %s are also trained on", len(both), name)


def part_of(images: Sequence[CaptionedImage], count: int) -> list[CaptionedImage]:
    """A fixed part of the images of a training, of up to so many different ones, which their content decides.

    No resolution is chosen for them.
    """
    return list(
        {
            image.digest: image._replace(resolution=None) for image in sorted(images, key=lambda image: image.digest)
        }.values()
    )[:count]

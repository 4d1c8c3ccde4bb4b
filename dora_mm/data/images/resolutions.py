"""The resolutions at which images are trained on: one, or each of several that an image is large enough for."""

from collections.abc import Iterable

from dora_mm.config.images import DataConfig
from dora_mm.data.images.buckets import Size, choose_bucket
from dora_mm.data.images.folder import CaptionedImage

LEAST_AREA = 0.9  # of resolution x resolution, as buckets have; an image with less is enlarged


def at_resolutions(images: Iterable[CaptionedImage], data: DataConfig) -> list[CaptionedImage]:
    """Each image at each of its resolutions, in the order of the images, the smallest resolution first.

    Images whose resolution is chosen stay as they are, so that this can be repeated.
    """
    return [
        image._replace(resolution=resolution)
        for image in images
        for resolution in ((image.resolution,) if image.resolution else resolutions_of(image, data))
    ]


def resolutions_of(image: CaptionedImage, data: DataConfig) -> list[int]:
    """The resolutions at which an image is trained on, ascending: at those that it has, and always at the smallest.

    At the smallest one an image is enlarged if need be, as with a single resolution: so that none is left out.
    """
    smallest, *others = _given(image, data)
    return [smallest, *(each for each in others if not is_smaller(image, each))]


def left_out_at(image: CaptionedImage, data: DataConfig) -> list[int]:
    """The resolutions at which an image is left out, because it has fewer pixels."""
    return [each for each in _given(image, data) if each not in resolutions_of(image, data)]


def is_smaller(image: CaptionedImage, resolution: int) -> bool:
    """Whether an image would be enlarged to be trained on at a resolution."""
    height, width = image.size
    return height * width < LEAST_AREA * resolution**2


def bucket_of(image: CaptionedImage, data: DataConfig) -> Size:
    """The bucket of an image at its resolution."""
    return choose_bucket(image.size, resolution_of(image, data))


def resolution_of(image: CaptionedImage, data: DataConfig) -> int:
    """The resolution of an image; the smallest of several, if none is chosen for it."""
    return image.resolution or _given(image, data)[0]


def _given(image: CaptionedImage, data: DataConfig) -> tuple[int, ...]:
    """The resolutions of an image's folder, or else of all."""
    own = data.folders[image.folder].resolution if data.folders else None
    return (own,) if own else data.all_resolutions

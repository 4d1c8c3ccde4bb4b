"""The geometry of a training image: its bucket and its crop. Sizes are (height, width)."""

from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from dora_mm.config.resolutions import bucket_step

Size = tuple[int, int]


class Framing(NamedTuple):
    """How an image is brought to its bucket: resized to `resized`, cropped at (top, left), then optionally mirrored."""

    original_size: Size  # upright, before resizing
    resized: Size
    top: int  # of the crop in the resized image, in pixels
    left: int
    target_size: Size  # the bucket
    flip: bool  # mirror horizontally, after cropping

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """(top, left) of the crop for size conditioning: in the resized image after it is mirrored, if `flip`."""
        if not self.flip:
            return self.top, self.left
        return self.top, self.resized[1] - self.target_size[1] - self.left


@lru_cache(maxsize=16)
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Every bucket of a resolution: sides from half to twice the resolution, area from 90 to 100 % of the square's.

    At 1024 these are the sizes of a published multi-aspect training (arXiv 2307.01952, appendix I) and (1344, 704).

    Raises:
        ValueError: The resolution is not a multiple of its bucket step.
    """
    step, area = bucket_step(resolution), resolution * resolution
    if resolution < step or resolution % step:
        raise ValueError(f"data.resolution {resolution} must be a multiple of {step}")
    sides = range(-(-resolution // 2 // step) * step or step, 2 * resolution + 1, step)
    return tuple((h, w) for h in sides for w in sides if 0.9 * area <= h * w <= area)


@lru_cache(maxsize=4096)  # of 20,000 images: it takes 0.1 ms, and sizes repeat
def choose_bucket(size: Size, resolution: int) -> Size:
    """The bucket whose aspect ratio is closest to the image's, so that as little as possible is cropped.

    Ties are resolved in favour of the larger bucket, then of the one closer to a square: an image and its transpose get
    transposed buckets. Ratios are compared as fractions, since rounded logarithms would break ties arbitrarily.

    Args:
        size: Of the image, upright.
        resolution: The side of the square bucket.

    Raises:
        ValueError: As in `bucket_sizes`.
    """
    height, width = size

    def distance(bucket: Size) -> tuple[Fraction, int, int]:
        ratio = Fraction(bucket[0] * width, bucket[1] * height)
        return max(ratio, 1 / ratio), -bucket[0] * bucket[1], max(bucket)

    return min(bucket_sizes(resolution), key=distance)


def frame(
    size: Size,
    bucket: Size,
    crop: Literal["center", "random"] = "center",
    generator: torch.Generator | None = None,
    flip: bool = False,
) -> Framing:
    """The framing that resizes an image to cover the bucket, keeping its aspect ratio, and crops it to the bucket.

    Args:
        size: Of the image, upright (EXIF applied), before resizing.
        bucket: The size of the crop.
        crop: "center", or "random" for a position drawn from `generator`.
        generator: Used for random crops only; None is torch's default generator.
        flip: Whether this image is mirrored; drawn by the caller.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    margins = (resized[0] - bucket[0], resized[1] - bucket[1])
    if crop == "random":
        top, left = (int(torch.randint(margin + 1, (), generator=generator)) for margin in margins)
    else:
        top, left = margins[0] // 2, margins[1] // 2
    return Framing(size, resized, top, left, bucket, flip)

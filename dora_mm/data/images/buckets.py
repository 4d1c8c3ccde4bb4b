"""Geometry of one training picture: its bucket, its crop, and the numbers SDXL is told about both. Sizes are (h, w)."""

from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from dora_mm.config.sdxl import bucket_step

Size = tuple[int, int]


class Framing(NamedTuple):
    """How an image becomes a bucket: resized to `resized`, cropped at (top, left), then mirrored or not."""

    original_size: Size  # before resizing
    resized: Size
    top: int
    left: int
    target_size: Size  # the bucket
    flip: bool

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """The crop's corner in the resized image as the model sees it: mirrored with the image."""
        if not self.flip:
            return self.top, self.left
        return self.top, self.resized[1] - self.target_size[1] - self.left


@lru_cache(maxsize=16)
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Every bucket of a resolution: sides from half to double, area from 90 to 100 % of the square's.

    At 1024 they are those of SDXL's multi-aspect training (arXiv 2307.01952, appendix I) and (1344, 704).
    """
    step, area = bucket_step(resolution), resolution * resolution
    if resolution < step or resolution % step:
        raise ValueError(f"data.resolution {resolution} must be a multiple of {step}")
    sides = range(-(-resolution // 2 // step) * step or step, 2 * resolution + 1, step)
    return tuple((h, w) for h in sides for w in sides if 0.9 * area <= h * w <= area)


def choose_bucket(size: Size, resolution: int) -> Size:
    """The bucket whose aspect ratio is closest to the image's, so that the least is cropped.

    Of buckets that are equally close the larger one is taken, then the one closer to a square: an image and its
    transpose get transposed buckets. Ratios are compared as fractions, since logarithms round ties apart.
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
    """Covers the bucket with the image, keeping its shape, and places the crop.

    Args:
        size: of the image, upright (EXIF applied), before resizing.
        crop: "random" draws the place from `generator`.
        flip: whether this picture is mirrored; the caller draws it.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    spare = (resized[0] - bucket[0], resized[1] - bucket[1])
    if crop == "random":
        top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in spare)
    else:
        top, left = spare[0] // 2, spare[1] // 2
    return Framing(size, resized, top, left, bucket, flip)

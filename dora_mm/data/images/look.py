"""Fingerprint of an image in a few bytes: it shows near-duplicates and blur."""

from typing import NamedTuple

from PIL import Image, ImageChops, ImageFilter, ImageStat

SIDE = 512  # pixels of the longer side, at least, at which blur is measured: about that of training
CELLS = 16  # of a side of what images are compared by
RADIUS = 4  # pixels of the blur that is added


class Look(NamedTuple):
    """The fingerprint of an image.

    Attributes:
        cells: The colours of its 16 x 16 parts, three bytes each.
        blur: From 0, sharp, to 1.
    """

    cells: bytes
    blur: float


def look_at(image: Image.Image) -> Look:
    """Looks at an RGB image: some 2 ms for a megapixel, where reading it takes 8 (JPEG) or more."""
    small = image.reduce(max(1, max(image.size) // SIDE))
    return Look(small.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes(), blur_of(small.convert("L")))


def blur_of(grey: Image.Image) -> float:
    """How little blurring changes a grey image: the share of its differences between neighbours that stays.

    A sharp image loses most of them, and one that is blurred already few (after Crete et al., "The blur effect",
    2007). It is the larger share of both directions, so that motion counts.
    """
    blurred = grey.filter(ImageFilter.BoxBlur(RADIUS))
    shares = []
    for right, down in ((1, 0), (0, 1)):
        before, after = _differences(grey, right, down), _differences(blurred, right, down)
        lost = ImageStat.Stat(ImageChops.subtract(before, after)).sum[0]
        shares.append(1 - lost / max(ImageStat.Stat(before).sum[0], 1))
    return max(shares)


def _differences(grey: Image.Image, right: int, down: int) -> Image.Image:
    """The absolute difference of each pixel from its neighbour, `right` and `down` of it."""
    width, height = grey.size
    return ImageChops.difference(
        grey.crop((right, down, width, height)), grey.crop((0, 0, width - right, height - down))
    )

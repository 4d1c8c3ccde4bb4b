"""The formats of images that are read, and the one function that opens an image file."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError, features

from dora_mm.utils.requirements import unmet_requirements

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # other decoders are not run on untrusted files
HEIF = "HEIF"  # the name of HEIC in Pillow, which decodes it with the package pillow-heif
# Brands of ISO base media files, ISO/IEC 23008-12 (HEVC) and the specification of AVIF. A camera may write mif1 (any
# codec) as the major brand, and the codec's among the compatible ones.
HEVC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AV1 = {b"avif", b"avis"}
ANY_CODEC = {b"mif1", b"msf1"}
MOST_BRANDS = 256  # bytes of the first box that are read; an iPhone writes 36 to 52


class MissingDecoderError(ValueError):
    """An image is in a format that nothing installed here decodes.

    Attributes:
        kind: The name of the format.
        advice: What to do, in the imperative.
        path: The image file, where it is one.
    """

    def __init__(self, kind: str, advice: str, path: Path | None = None):
        super().__init__(f"{path or 'the image'} is in {kind} and is not read: {advice}")
        self.kind, self.advice, self.path = kind, advice, path


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Opens an image by its content, whatever its name; only the header is read, and the caller closes it.

    Raises:
        MissingDecoderError: It is HEIC or AVIF, and nothing installed decodes that.
        PIL.UnidentifiedImageError: It is in none of the formats that are read.
    """
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        brands = _brands(source)
        if brands & AV1 and not features.check("avif"):
            raise MissingDecoderError("AVIF", "install a Pillow that has it, or save as PNG or JPEG") from None
        if not brands & HEVC and (brands & AV1 or not brands & ANY_CODEC):
            raise
    _register_heif()
    return Image.open(source, formats=(HEIF,))


@cache
def _register_heif() -> None:
    """Lets Pillow decode HEIC: the image alone, no thumbnails, depth maps or other images of the file.

    Raises:
        MissingDecoderError: pillow-heif is missing, or a release with published holes.
    """
    advice = "pip install --upgrade 'dora_mm[heic]', or save as PNG or JPEG"
    if any(unmet_requirements("heic")):
        raise MissingDecoderError("HEIC", advice)
    try:
        pillow_heif = import_module("pillow_heif")
    except ImportError:  # a wheel of another system
        raise MissingDecoderError("HEIC", advice) from None
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _brands(source: Path | BinaryIO) -> set[bytes]:
    """The brands in the first box of an ISO base media file; empty for any other file."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(MOST_BRANDS)
    else:
        source.seek(0)
        head = source.read(MOST_BRANDS)
    size = min(int.from_bytes(head[:4], "big"), len(head))
    if head[4:8] != b"ftyp":
        return set()
    return {head[8:12], *(head[start : start + 4] for start in range(16, size, 4))}

"""Image files to pixels: every pixel format becomes upright RGB, and errors name the file."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps

from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.decoders import MissingDecoderError, open_image
from dora_mm.utils.messages import ChangedFileError, first_line

Read = Callable[[Path], bytes]
# 80 megapixels are 240 MB of RGB; a PNG of a few kilobytes can claim thousands of times that.
MAX_PIXELS = 80_000_000


def load_rgb(path: str | Path, background: str = "white", read: Read = Path.read_bytes) -> Image.Image:
    """Loads an image as upright RGB: EXIF orientation and colour profile applied, transparency composed.

    Args:
        path: The image file.
        background: The colour under transparent pixels, a CSS name or "#rrggbb".
        read: Reads the file, and may compare its content: see `data/seen.py`.

    Raises:
        ValueError: The file is missing, empty, broken, too large, or has 32-bit pixels, whose value range is unknown.
    """
    with _opened(Path(path), read) as image:
        return _composed(_upright(image), image.info.get("icc_profile"), background)


def load_rgba(path: str | Path, read: Read = Path.read_bytes) -> Image.Image:
    """Loads an image as upright RGBA, with its colour profile applied.

    Args:
        path: The image file.
        read: As in `load_rgb`.

    Raises:
        ValueError: As in `load_rgb`.
    """
    with _opened(Path(path), read) as image:
        upright, profile = _upright(image), image.info.get("icc_profile")
        if not upright.has_transparency_data:
            return _in_srgb(upright, profile).convert("RGBA")
        rgba = upright.convert("RGBA")
        colours = _in_srgb(rgba.convert("RGB"), profile)
        colours.putalpha(rgba.getchannel("A"))
        return colours


def load_alpha(path: str | Path, read: Read = Path.read_bytes) -> Image.Image | None:
    """The upright transparency of an image in 8 bits, 255 where it is opaque; None if all of it is.

    Args:
        path: The image file.
        read: As in `load_rgb`.

    Raises:
        ValueError: As in `load_rgb`.
    """
    with _opened(Path(path), read) as image:
        _decode(image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = _eight_bits(upright)
        alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
        return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def upright_size(path: str | Path) -> tuple[int, int]:
    """(h, w) of an image as `load_rgb` returns it, read from its header: the pixels of TIFF files alone are decoded.

    Raises:
        ValueError: The file is missing, empty, too large or no image.
    """
    with _opened(Path(path)) as image:
        if image.format == "TIFF":  # Pillow turns it by itself, in some releases when it reads the header
            _decode(image)
            upright = ImageOps.exif_transpose(image)
            return upright.height, upright.width
        # Pillow decodes a whole PNG to look for its orientation behind the pixels.
        known = image.format != "PNG" or "exif" in image.info
        turned = known and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def render(image: Image.Image, framing: Framing) -> torch.Tensor:
    """The framed part of an RGB image as pixels.

    Args:
        image: Upright RGB, of `framing.original_size`.
        framing: Resize, crop and mirroring.

    Returns:
        (3, h, w) float32 in [-1, 1], with (h, w) = `framing.target_size`.
    """
    height, width = framing.target_size
    # Only the crop is resized: a complete image of 1 x 6000 would be 3,072,000 pixels wide at a height of 512.
    part = image.resize((width, height), Image.Resampling.LANCZOS, box=crop_box(image, framing))
    if framing.flip:
        part = ImageOps.mirror(part)
    pixels_HWC = torch.from_numpy(np.array(part, dtype=np.float32))
    return pixels_HWC.permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


def crop_box(image: Image.Image, framing: Framing) -> tuple[float, float, float, float]:
    """The framed part in an image before it is resized: (left, top, right, bottom)."""
    height, width = framing.target_size
    down, right = image.height / framing.resized[0], image.width / framing.resized[1]
    left, top = framing.left * right, framing.top * down
    return left, top, min(left + width * right, image.width), min(top + height * down, image.height)


@contextlib.contextmanager
def _opened(path: Path, read: Read | None = None) -> Iterator[Image.Image]:
    """Opens an image after checking its header; the caller decodes it inside the `with` block.

    Args:
        path: The image file.
        read: Reads the file; None: the decoder does, as far as it needs it.

    Raises:
        ValueError: The file is missing, empty, too large or of an unsupported format; or anything fails inside the
            block. The message names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): replace or delete it")
    try:
        source: Any = path if read is None else _Content(read(path), path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = MAX_PIXELS // 1_000_000
        raise ValueError(f"{path} is larger than {limit} megapixels: scale it down") from None
    except PermissionError:
        raise ValueError(f"{path} cannot be read: permission denied") from None
    except ChangedFileError:
        raise
    except MissingDecoderError as error:
        raise MissingDecoderError(error.kind, error.advice, path) from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError and more
        raise ValueError(f"{path} is not a complete image ({first_line(error)}): replace or delete it") from error


class _Content(io.BytesIO):
    """The content of a file, which Pillow's messages name."""

    def __init__(self, content: bytes, path: Path):
        super().__init__(content)
        self._path = path

    def __repr__(self) -> str:
        return repr(str(self._path))


def _decode(image: Image.Image) -> None:
    """Decodes the pixels; a damaged file raises anything but a ValueError, which here says what a person can do."""
    try:
        image.load()
    except ValueError as error:  # of pillow-heif
        raise OSError(first_line(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """An image of 8 bits, decoded and turned as its EXIF data say."""
    _decode(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return _eight_bits(upright)
    if upright.mode in ("I", "F"):
        raise ValueError(f"has 32-bit pixels ({upright.mode}) of unknown range: save it with 8 or 16 bits")
    return upright


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to L or LA; Pillow's own conversion clips at 255, which makes most of it white."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _composed(image: Image.Image, profile: bytes | None, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, ImageColor.getcolor(background, "RGB"))
    return Image.composite(_in_srgb(rgba.convert("RGB"), profile), canvas, rgba.getchannel("A"))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB and CMYK are converted through their colour profile (without it CMYK is oversaturated), others by Pillow."""
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # the profile is damaged or for another mode, but the pixels are valid
        return image.convert("RGB")
    assert converted is not None  # only in-place conversion returns None
    return converted


def on_white(image: Image.Image) -> Image.Image:
    """The image composed on white, in RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

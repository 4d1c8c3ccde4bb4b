"""Image files to pixels: every mode that a file can have becomes upright RGB, and what cannot be read is named."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps

from dora_mm.data.images.buckets import Framing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # other decoders are not run on a stranger's files
# 80 megapixels are 240 MB of RGB; a PNG of a few kilobytes can claim thousands of times that.
MAX_PIXELS = 80_000_000


def load_rgb(path: str | Path, background: str = "white") -> Image.Image:
    """The image upright and in RGB: EXIF orientation and colour profile applied, transparency composed on `background`.

    Raises:
        ValueError: naming the file, when it is missing, empty, broken, too large or of a kind that has no certain look.
    """
    with opened(Path(path)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = _eight_bits(upright)
        elif upright.mode in ("I", "F"):
            raise ValueError(f"has 32-bit pixels ({upright.mode}) of unknown range: save it with 8 or 16 bits")
        return _composed(upright, image.info.get("icc_profile"), background)


def render(image: Image.Image, framing: Framing) -> torch.Tensor:
    """(3, h, w) float32 pixels in [-1, 1] of the framed part of an RGB image."""
    height, width = framing.target_size
    # Only the crop is resized: all of a picture of 1 x 6000 would be 3,072,000 pixels wide at a height of 512.
    down, right = image.height / framing.resized[0], image.width / framing.resized[1]
    left, top = framing.left * right, framing.top * down
    box = (left, top, min(left + width * right, image.width), min(top + height * down, image.height))
    part = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if framing.flip:
        part = ImageOps.mirror(part)
    pixels_HWC = torch.from_numpy(np.array(part, dtype=np.float32))
    return pixels_HWC.permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image with an acceptable header; whatever fails inside the block is a ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): replace or delete it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = MAX_PIXELS // 1_000_000
        raise ValueError(f"{path} is larger than {limit} megapixels: scale it down") from None
    except PermissionError:
        raise ValueError(f"{path} cannot be read: permission denied") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, EOFError and more
        raise ValueError(f"{path} is not a whole image ({_first_line(error)}): replace or delete it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to L or LA by scaling; Pillow's own conversion clips at 255 and turns most of it white."""
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
    """RGB and CMYK through their colour profile (CMYK looks lurid without it), everything else by Pillow's rules."""
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # the profile is damaged or for another mode, the pixels are not
        return image.convert("RGB")
    assert converted is not None  # only in-place conversion returns None
    return converted


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def on_white(picture: Image.Image) -> Image.Image:
    """RGB picture on white of one with transparency."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")

"""Names of colours, and icons in other colours, so that a question about a colour has exactly one true answer.

Shape legend: H, W pixels. Images are RGBA; HSV is in [0, 1] throughout.
"""

import numpy as np
from PIL import Image

PAINTS: dict[str, tuple[int, int, int]] = {  # colours of painted objects, easily distinguished by eye
    "red": (222, 32, 36),
    "orange": (250, 135, 20),
    "yellow": (252, 211, 30),
    "green": (52, 165, 70),
    "blue": (40, 105, 225),
    "purple": (135, 60, 190),
    "pink": (250, 130, 190),
    "black": (42, 42, 46),
    "white": (245, 245, 245),
}
PALE: dict[str, tuple[int, int, int]] = {  # plain backgrounds: easily named, and every object stands out
    "red": (224, 92, 86),
    "orange": (250, 190, 130),
    "yellow": (252, 238, 160),
    "green": (175, 222, 165),
    "blue": (165, 205, 245),
    "purple": (205, 180, 235),
    "pink": (252, 205, 225),
    "gray": (186, 188, 192),
    "white": (252, 252, 252),
}
HUES = (  # upper end in degrees, name; 345 and more is red again
    (14, "red"),
    (40, "orange"),
    (68, "yellow"),
    (168, "green"),
    (252, "blue"),
    (300, "purple"),
    (342, "pink"),
    (360, "red"),
)
MOST = 0.6  # share of an object that one named colour must cover to be its colour
OTHER = 0.25  # share that the second most frequent colour may cover


def color_shares(image: Image.Image) -> dict[str, float]:
    """The named colours of an image: name -> share of the opaque pixels, largest first.

    Raises:
        ValueError: No pixel is opaque.
    """
    rgba_HW4 = np.asarray(image.convert("RGBA"))
    opaque = rgba_HW4[..., 3] > 127
    if not opaque.any():
        raise ValueError("an image without an opaque pixel has no colour")
    hue, saturation, value = np.moveaxis(to_hsv(rgba_HW4[opaque][:, :3]), -1, 0)
    degrees = hue * 360
    names = np.select([degrees < end for end, _ in HUES], [name for _, name in HUES], "red")
    warm = (degrees < 45) | (degrees > 345)
    names[(names == "red") & (saturation < 0.55) & (value > 0.7)] = "pink"
    names[warm & (value < 0.68) & (degrees > 8) & (degrees < 45)] = "brown"
    names[(degrees > 45) & (degrees < 60) & (value < 0.5)] = "brown"
    names[saturation < 0.15] = "gray"
    names[(saturation < 0.12) & (value > 0.82)] = "white"
    names[(value < 0.3) | ((saturation < 0.3) & (value < 0.36))] = "black"
    found, counts = np.unique(names, return_counts=True)
    shares = {str(name): float(count) / len(names) for name, count in zip(found, counts, strict=True)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def color_of(image: Image.Image) -> str | None:
    """The named colour that covers most of the opaque pixels; None for a multi-coloured image."""
    (name, share), *others = color_shares(image).items()
    return name if share >= MOST and (not others or others[0][1] <= OTHER) else None


def paint(image: Image.Image, color: str) -> Image.Image:
    """Replaces the main hue of an image by a colour of PAINTS; light, shade and other hues do not change.

    An image without a hue to replace is returned unchanged; `color_of` shows whether the result has the colour.
    """
    rgba_HW4 = np.asarray(image.convert("RGBA"))
    hsv_HW3 = to_hsv(rgba_HW4[..., :3])
    hue, saturation, value = np.moveaxis(hsv_HW3, -1, 0)
    weight = saturation * value * (rgba_HW4[..., 3] > 127) * (saturation > 0.25)
    if weight.sum() < 0.01 * weight.size:
        return image
    histogram = np.bincount((hue * 36).astype(int).ravel() % 36, weights=weight.ravel(), minlength=36)
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    main = (int(smooth.argmax()) + 0.5) / 36
    distance = np.abs((hue - main + 0.5) % 1.0 - 0.5) * 360
    share = np.clip((60 - distance) / 15, 0, 1) * np.clip((saturation - 0.12) / 0.12, 0, 1)  # of the new colour
    middle = np.average(value, weights=weight * (share > 0.5) + 1e-9)
    light = np.clip(value / middle, 0.55, 1.35)[..., None]
    target = np.array(PAINTS[color], dtype=float)
    painted = np.where(light > 1, target + (255 - target) * (light - 1), target * (0.35 + 0.65 * light))
    mixed = rgba_HW4[..., :3] * (1 - share[..., None]) + painted * share[..., None]
    rgba = np.concatenate([np.clip(mixed.round(), 0, 255).astype(np.uint8), rgba_HW4[..., 3:]], axis=-1)
    return Image.fromarray(rgba)


def two_tone(outline: Image.Image, color: str) -> Image.Image:
    """Draws a one-coloured icon in two shades of a colour of PAINTS: its lines (ink), and the area inside them (paper).

    The larger of the two gets the colour itself, so that it covers most of the object. Needs scipy.
    """
    from scipy.ndimage import binary_fill_holes

    ink_HW = np.asarray(outline.convert("RGBA"))[..., 3] / 255.0
    inside_HW = np.asarray(binary_fill_holes(ink_HW > 0.3))
    solid = ink_HW.sum() >= 0.5 * inside_HW.sum()
    main = np.array(PAINTS[color], dtype=float)
    bright = main.mean() > 60
    shade = main * 0.3 if bright else main + (255 - main) * 0.75
    if solid and color != "white":
        shade = main + (255 - main) * 0.75
    ink, paper = (main, shade) if solid else (shade, main)
    rgb = paper + (ink - paper) * ink_HW[..., None]
    alpha = np.maximum(ink_HW, inside_HW)[..., None] * 255
    return Image.fromarray(np.concatenate([rgb, alpha], axis=-1).round().astype(np.uint8))


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) 8-bit RGB -> (..., 3) HSV in [0, 1]."""
    flat = Image.fromarray(np.ascontiguousarray(rgb.reshape(-1, 1, 3)))
    return np.asarray(flat.convert("HSV")).reshape(rgb.shape) / 255.0

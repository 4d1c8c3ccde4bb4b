"""Images of scenes: icons with a soft shadow, on a plain colour or on a section of a photograph."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from samples.build.scenes.colors import PAINTS, PALE, color_of, paint, two_tone
from samples.build.scenes.scenes import PHOTOS, SIZE, Background, Placed, Scene
from samples.build.scenes.things import STYLES, Thing

PHOTO_SIZE = 320  # side of a photo; a scene shows a section of SIZE x SIZE
SHADOW = 0.38  # opacity
TINTS = {  # name: the black-and-white photo in skimage.data, the colours of its dark and bright parts
    "bricks": ("brick", "#5a2a1e", "#e0b090"),
    "grass": ("grass", "#1d4a14", "#b5dc78"),
    "gravel": ("gravel", "#4a4742", "#e8e4dc"),
}


def load_photos() -> dict[str, Image.Image]:
    """Loads the photographs of PHOTOS; all are CC0 or public domain and are part of scikit-image.

    Returns:
        Name -> RGB image, PHOTO_SIZE x PHOTO_SIZE.

    Raises:
        ValueError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError("drawing scenes needs scikit-image (pip install 'dora_mm[samples]')") from error
    photos = {}
    for name, (source, dark, light) in TINTS.items():
        gray = ImageOps.autocontrast(Image.fromarray(getattr(data, source)()), cutoff=1)
        photos[name] = ImageOps.colorize(gray, dark, light)
    photos["wood"] = Image.fromarray(data.coffee()).crop((450, 20, 600, 170))  # the table next to the cup
    photos["space"] = Image.fromarray(data.hubble_deep_field()).convert("RGB").crop((100, 100, 500, 500))
    photos = {name: photos[name].resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.LANCZOS) for name in PHOTOS}
    return {name: soften(photo, name) for name, photo in photos.items()}


def soften(photo: Image.Image, name: str) -> Image.Image:
    """Blurs a photo and reduces its contrast, so that it is clearly the background."""
    photo = photo.filter(ImageFilter.GaussianBlur(0.6 if name == "space" else 1.8))
    return photo if name == "space" else ImageEnhance.Contrast(photo).enhance(0.75)


def describe_thing(row: Mapping[str, Any], icons: Mapping[tuple[str, str], Image.Image]) -> Thing:
    """Determines the colours of an object from its icons.

    Args:
        row: The object's line in samples/things.jsonl, with `code`. Optional keys: `plural` if irregular, `kind`;
            `painted`: whether it may be painted in the multi-coloured styles; `natural`: its usual colour.
        icons: (style, name) -> RGBA icon.
    """
    name, natural = row["name"], row.get("natural")
    colors = {
        style: truthful_colors(icons[style, name], style)
        for style in STYLES
        if style == "contrast" or row.get("painted")
    }
    as_drawn = {s: natural for s in STYLES if s != "contrast" and natural and color_of(icons[s, name]) == natural}
    return Thing(name, row.get("plural", f"{name}s"), row["code"], row.get("kind"), colors, as_drawn)


def truthful_colors(icon: Image.Image, style: str) -> tuple[str, ...]:
    """The paints with which an icon clearly has the colour of the paint.

    Two-tone icons are shades of one colour anyway; only black and white may be confused with each other.
    """
    if style == "contrast":
        return tuple(c for c in PAINTS if c not in ("black", "white") or color_of(two_tone(icon, c)) == c)
    return tuple(color for color in PAINTS if color_of(paint(icon, color)) == color)


class Artist:
    """Draws scenes.

    Args:
        icons: (style, name of the object) -> RGBA icon; those of the style "contrast" are lines on transparent ground.
        photos: Name of a background -> RGB image, at least SIZE x SIZE.
    """

    def __init__(self, icons: Mapping[tuple[str, str], Image.Image], photos: Mapping[str, Image.Image]) -> None:
        self.icons, self.photos = icons, photos
        self.painted = lru_cache(maxsize=None)(self._painted)

    def draw(self, scene: Scene) -> Image.Image:
        """Draws a scene as an RGB image of SIZE x SIZE."""
        image = self.background(scene.background)
        for placed in scene.objects:
            self.put(image, placed, rim=scene.background.name != "plain")
        return image

    def background(self, background: Background) -> Image.Image:
        """Draws a background as an RGB image of SIZE x SIZE."""
        if background.color is not None:
            return Image.new("RGB", (SIZE, SIZE), PALE[background.color])
        photo = self.photos[background.name]
        left, top = (int(part * (side - SIZE + 1)) for part, side in zip(background.offset, photo.size, strict=True))
        return photo.crop((left, top, left + SIZE, top + SIZE))

    def put(self, image: Image.Image, placed: Placed, rim: bool) -> None:
        """Draws one object into an image.

        Args:
            image: The RGB image, changed in place.
            placed: The object.
            rim: Whether to add a white rim like that of a sticker, which separates the object from a photo.
        """
        icon = self.painted(placed.style, placed.name, placed.color if placed.painted else None)
        scale = placed.size / max(icon.size)
        icon = icon.resize([max(round(side * scale), 1) for side in icon.size], Image.Resampling.LANCZOS)
        icon = ImageOps.mirror(icon) if placed.mirrored else icon
        layer = Image.new("RGBA", image.size)
        layer.paste(icon, (placed.x - icon.width // 2, placed.y - icon.height // 2))
        alpha = layer.getchannel("A")
        if rim:
            solid = alpha.point([0] * 128 + [255] * 128)  # a faint glow around an icon gets no rim
            alpha = solid.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.6))
        shadow = Image.new("L", image.size)
        shadow.paste(alpha.filter(ImageFilter.GaussianBlur(3)).point([int(a * SHADOW) for a in range(256)]), (1, 3))
        image.paste((0, 0, 0), mask=shadow)
        if rim:
            image.paste((255, 255, 255), mask=alpha)
        image.paste(layer.convert("RGB"), mask=layer.getchannel("A"))

    def _painted(self, style: str, name: str, color: str | None) -> Image.Image:
        icon = self.icons[style, name]
        if color is not None:
            icon = two_tone(icon, color) if style == "contrast" else paint(icon, color)
        return icon.crop(icon.getchannel("A").getbbox())

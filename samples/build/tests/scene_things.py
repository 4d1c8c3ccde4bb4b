"""Objects for tests of scenes, drawn as plain shapes, so that the tests need no icons."""

from PIL import Image, ImageDraw

from samples.build.scenes.colors import PAINTS
from samples.build.scenes.scenes import PHOTOS
from samples.build.scenes.things import STYLES, Thing

SHAPES = ("disc", "box", "wedge", "gem", "arch", "bar", "cross", "ring")
OTHERS = ("cone", "cube", "drop", "fork", "hoop", "knot", "lens", "leaf", "pipe", "reel", "tube", "vase")  # all round
KINDS = ("animal", "animal", "fruit", "fruit", "tool", "tool", None, None)


def shape(name: str, fill: tuple[int, int, int], size: int = 60) -> Image.Image:
    image = Image.new("RGBA", (size, size))
    pen, end = ImageDraw.Draw(image), size - 1
    outlines = {
        "wedge": [(0, end), (end, end), (end // 2, 0)],
        "gem": [(end // 2, 0), (end, end // 2), (end // 2, end), (0, end // 2)],
        "bar": [(0, end // 3), (end, end // 3), (end, end // 2), (0, end // 2)],
        "box": [(0, 0), (end, 0), (end, end), (0, end)],
    }
    if name in outlines:
        pen.polygon(outlines[name], fill=fill)
    else:
        pen.ellipse((0, 0, end, end), fill=fill)
    return image


def some_things(*more: str) -> tuple[Thing, ...]:
    """A few objects, so that scenes have some in common; `more` adds others, which clips need."""
    paints = {style: tuple(PAINTS) for style in STYLES}
    names = [*zip(SHAPES, KINDS, strict=True), *((name, None) for name in more)]
    return tuple(
        Thing(name, f"{name}s", f"{code:x}", kind, paints, {"flat": "red"}) for code, (name, kind) in enumerate(names)
    )


def shape_icons() -> dict[tuple[str, str], Image.Image]:
    return {(style, name): shape(name, PAINTS["red"]) for style in STYLES for name in (*SHAPES, *OTHERS)}


def plain_photos() -> dict[str, Image.Image]:
    return {name: Image.new("RGB", (320, 320), (90, 90, 90)) for name in PHOTOS}

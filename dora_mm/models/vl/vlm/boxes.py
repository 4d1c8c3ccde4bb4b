"""Boxes around things in images, and the names of these, as each model reads and writes them: the forms of ms-swift."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from dora_mm.data.vl.example import BOX, REF, Turn, escaped

SHARES = 1000  # of width and height, in which most models count
MARKER = re.compile(f"{re.escape(BOX)}|{re.escape(REF)}")
Numbers = Sequence[int]  # x1, y1, x2, y2, or x, y of a point


class BoxForm(NamedTuple):
    """How a model reads boxes.

    Attributes:
        box: A box as text.
        name: The name of a thing as text.
        in_pixels: Whether numbers are pixels of the image as its processor resizes it; else SHARES.
    """

    box: Callable[[Numbers], str]
    name: str = "{}"
    in_pixels: bool = False


def _points(box: Numbers) -> str:
    return ",".join(f"({x},{y})" for x, y in zip(box[::2], box[1::2], strict=True))


QWEN = BoxForm(lambda box: f"<|box_start|>{_points(box)}<|box_end|>", "<|object_ref_start|>{}<|object_ref_end|>")
INTERNVL = BoxForm(lambda box: f"<box>[{list(box)}]</box>", "<ref>{}</ref>")
OTHERS = BoxForm(lambda box: f"[{_points(box)}]")
FORMS = {"qwen2_5": QWEN._replace(in_pixels=True), "qwen": QWEN, "internvl": INTERNVL}  # by how a model_type begins
COUNTING = (*FORMS, "glm4")  # classes that write boxes without being trained to, in the numbers of their form


def with_boxes(turns: Sequence[Turn], boxes: str, images: Sequence[Any], processor: Any, model_type: str) -> list[Turn]:
    """Turns with their boxes and names in place of the markers.

    Args:
        turns: Turns with markers.
        boxes: The boxes; see `Example`.
        images: The images of the row.
        processor: The model's processor.
        model_type: Its class, as in its config.

    Raises:
        ValueError: A box is on an image that the row does not have.
    """
    given, form = json.loads(boxes), form_of(model_type)
    sizes = [(image.size, _grid(image.size, processor, form)) for image in images]
    if given["bbox"] and max(given["image"]) >= len(images):
        raise ValueError(f"it has a box on image {max(given['image'])}, and {len(images)} images, counted from 0")
    scaled = [_scaled(box, sizes[n], given["norm1"]) for box, n in zip(given["bbox"], given["image"], strict=True)]
    left = {BOX: iter(map(form.box, scaled)), REF: iter(form.name.format(name) for name in given["ref"])}

    def filled(found: re.Match[str]) -> str:
        return escaped(next(left[found[0]], found[0]))

    return [turn._replace(text=MARKER.sub(filled, turn.text)) for turn in turns]


def form_of(model_type: str) -> BoxForm:
    """How a model reads boxes."""
    return next((form for start, form in FORMS.items() if model_type.startswith(start)), OTHERS)


def box_grid(size: tuple[int, int], processor: Any, model_type: str) -> Numbers | None:
    """The width and height of which a class counts in the boxes that it writes; None: not known, or tokens say it.

    Args:
        size: Of the image, in pixels.
        processor: The model's processor.
        model_type: Its class, as in its config.
    """
    return _grid(size, processor, form_of(model_type)) if model_type.startswith(COUNTING) else None


def _grid(size: tuple[int, int], processor: Any, form: BoxForm) -> Numbers:
    """The width and height of which the model counts, in an image of this one."""
    if not form.in_pixels:
        return SHARES, SHARES
    resizer = processor.image_processor
    _, rows, columns = resizer(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0].tolist()
    return columns * resizer.patch_size, rows * resizer.patch_size


def _scaled(box: Sequence[float], sizes: tuple[Numbers, Numbers], is_share: bool) -> list[int]:
    size, wanted = (1, 1) if is_share else sizes[0], sizes[1]
    return [round(value / size[index % 2] * wanted[index % 2]) for index, value in enumerate(box)]

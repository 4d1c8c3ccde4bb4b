"""The data of a gallery page: its columns, its images, and which of them belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_mm.sampling.manifest import ManifestEntry

# Images that are compared with each other agree in all of these, and in further settings as far as they can: what
# each run has of its own, such as the name of a checkpoint, does not count.
OF_GUIDANCE = ("negative_prompt", "guidance", "guidance_rescale")
ALWAYS_EQUAL = ("prompt", "seed", "steps", *OF_GUIDANCE, "width", "height", "scheduler")
LARGEST_INTEGER = 2**53  # JavaScript rounds larger ones: seeds may be


@dataclass(frozen=True)
class GalleryImage:
    """One image of a gallery.

    Attributes:
        run: The name of its run.
        entry: Its line of the manifest.
        file: Its address, relative to the page; None where there is no image.
        thumbnail: The address of a small version; the same as `file` where that is small itself.
        size: Width and height in pixels.
    """

    run: str
    entry: ManifestEntry
    file: str | None = None
    thumbnail: str | None = None
    size: tuple[int, int] | None = None


def gallery_data(images: Sequence[GalleryImage]) -> dict[str, Any]:
    """Returns all that the page knows, as plain values that JSON and JavaScript hold exactly.

    Every image has its `values` in the order of `columns`; `before` is the number of the same image without an
    adapter, and images of several runs that have the same `group` differ in nothing but the run.
    """
    settings = dict.fromkeys(name for image in images for name in image.entry.settings)
    scores = dict.fromkeys(name for image in images for name in image.entry.scores)
    columns: list[tuple[str, str, Callable[[GalleryImage], Any]]] = [
        ("run", "run", lambda image: image.run),
        ("status", "status", lambda image: image.entry.status),
        *((name, "setting", lambda image, name=name: image.entry.settings.get(name)) for name in settings),
        *((name, "score", lambda image, name=name: image.entry.scores.get(name)) for name in scores),
    ]
    values = [[json_value(value(image)) for _, _, value in columns] for image in images]
    kept = zip(images, values, befores(images), groups(images), strict=True)
    return {
        "columns": [
            {"name": name, "kind": kind, "varies": len({_text(row[index]) for row in values}) > 1}
            for index, (name, kind, _) in enumerate(columns)
        ],
        "images": [_image(image, row, before, group) for image, row, before, group in kept],
    }


def _image(image: GalleryImage, values: list[Any], before: int | None, group: int) -> dict[str, Any]:
    return {
        "values": values,
        "path": image.entry.file,
        "file": image.file,
        "thumbnail": image.thumbnail,
        "size": image.size,
        "reason": image.entry.reason,
        "before": before,
        "group": group,
    }


# --- images that belong together ------------------------------------------------------------------------------------


def befores(images: Sequence[GalleryImage]) -> list[int | None]:
    """Finds, for every image with an adapter, the number of the same image without one.

    One of the same run is preferred. Without an adapter means that `adapter` is None or that `strength` is 0.
    """
    key = matching(
        images, lambda image: _is_bare(image.entry), ("adapter", "strength"), always=(*ALWAYS_EQUAL, "model")
    )
    bare: dict[tuple[str, str | None], int] = {}
    for number, image in enumerate(images):
        if image.file and _is_bare(image.entry):
            for run in (image.run, None):
                bare.setdefault((key(image), run), number)

    def before(image: GalleryImage) -> int | None:
        if not image.file or _is_bare(image.entry):
            return None
        return bare.get((key(image), image.run), bare.get((key(image), None)))

    return [before(image) for image in images]


def groups(images: Sequence[GalleryImage]) -> list[int]:
    """Numbers the images so that those of several runs with the same settings have the same number."""
    key = matching(images, lambda image: image.run)
    numbers: dict[tuple[str, bool], int] = {}
    return [numbers.setdefault((key(image), _is_bare(image.entry)), len(numbers)) for image in images]


def matching(
    images: Sequence[GalleryImage],
    side: Callable[[GalleryImage], Hashable],
    apart: tuple[str, ...] = (),
    always: Sequence[str] = ALWAYS_EQUAL,
) -> Callable[[GalleryImage], str]:
    """Returns a function whose value is equal for images of different sides that should be compared.

    Args:
        images: All images.
        side: What tells the sides apart, such as the run.
        apart: What the names of settings that may differ begin with.
        always: Settings that are compared in any case. Another one is left out where no two sides share a value of it,
            as when every run has an adapter of its own.
    """
    names = dict.fromkeys(name for image in images for name in image.entry.settings if not name.startswith(apart))
    compared = [name for name in names if name in always or not _is_tied(name, images, side)]
    return lambda image: _text([image.entry.settings.get(name) for name in compared])


def _is_tied(name: str, images: Sequence[GalleryImage], side: Callable[[GalleryImage], Hashable]) -> bool:
    sides: dict[str, Hashable] = {}
    for image in images:
        value = image.entry.settings.get(name)
        if value is not None and sides.setdefault(_text(value), side(image)) != side(image):
            return False
    return True


def _is_bare(entry: ManifestEntry) -> bool:
    return entry.settings.get("adapter") is None or entry.settings.get("strength") == 0


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def json_value(value: Any) -> Any:
    """A value as JSON and JavaScript hold it: NaN, infinities and large integers become text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    return value if abs(value) <= LARGEST_INTEGER else str(value)

"""The data of a gallery page: its columns, its images, and which of them belong together."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from dora_mm.sampling.manifest import ManifestEntry

# Images that are compared with each other agree in all of these, and in further settings as far as they can: what
# each run has of its own, such as the name of a checkpoint, does not count.
OF_GUIDANCE = ("negative_prompt", "guidance", "guidance_rescale")
ALWAYS_EQUAL = ("prompt", "seed", "steps", *OF_GUIDANCE, "width", "height", "scheduler")
LARGEST_INTEGER = 2**53  # JavaScript rounds larger ones: seeds may be
NOTHING_SHOWN = None, None, None

Listed = tuple[str, ManifestEntry]  # the name of a run, and an entry of its manifest
ShownImage = (
    tuple[str, str, tuple[int, int]] | tuple[None, None, None]
)  # addresses of image and thumbnail, size in pixels


def gallery_data(images: Sequence[Listed], shown: Sequence[ShownImage]) -> dict[str, Any]:
    """Returns all that the page knows, as plain values that JSON and JavaScript hold exactly.

    Every image has its `values` in the order of `columns`; `before` is the number of the same image without an
    adapter, and images of several runs that have the same `group` differ in nothing but the run.

    Args:
        images: The images of all runs.
        shown: What the page shows of each: its address and that of a small version, both relative to the page, which
            are the same where it is small itself, and its size. Those that are not "done" have `NOTHING_SHOWN`.
    """
    settings = dict.fromkeys(name for _, entry in images for name in entry.settings)
    scores = dict.fromkeys(name for _, entry in images for name in entry.scores)
    columns = [("run", "run"), ("status", "status")]
    columns += [(name, "setting") for name in settings] + [(name, "score") for name in scores]
    rows = [
        json_value([run, entry.status, *map(entry.settings.get, settings), *map(entry.scores.get, scores)])
        for run, entry in images
    ]
    found = zip(images, shown, rows, befores(images), groups(images), strict=True)
    return {
        "columns": [
            {"name": name, "kind": kind, "varies": len({_text(row[index]) for row in rows}) > 1}
            for index, (name, kind) in enumerate(columns)
        ],
        "images": [
            {
                "values": row,
                "path": entry.file,
                "file": file,
                "thumbnail": thumbnail,
                "size": size,
                "reason": entry.reason,
                "before": before,
                "group": group,
            }
            for (_, entry), (file, thumbnail, size), row, before, group in found
        ],
    }


# --- images that belong together ------------------------------------------------------------------------------------


def befores(images: Sequence[Listed]) -> list[int | None]:
    """Finds, for every image with an adapter, the number of the same image without one.

    One of the same run is preferred. Without an adapter means that `adapter` is None or that `strength` is 0.
    """
    bare = [_is_bare(entry) for _, entry in images]
    keys = matching(images, bare, ("adapter", "strength"), always=(*ALWAYS_EQUAL, "model"))
    numbers: dict[tuple[str, str | None], int] = {}
    for number, (run, entry) in enumerate(images):
        if entry.status == "done" and bare[number]:
            for side in (run, None):
                numbers.setdefault((keys[number], side), number)
    return [
        None if entry.status != "done" or is_bare else numbers.get((key, run), numbers.get((key, None)))
        for (run, entry), key, is_bare in zip(images, keys, bare, strict=True)
    ]


def groups(images: Sequence[Listed]) -> list[int]:
    """Numbers the images so that those of several runs with the same settings have the same number."""
    keys = matching(images, [run for run, _ in images])
    numbers: dict[tuple[str, bool], int] = {}
    return [
        numbers.setdefault((key, _is_bare(entry)), len(numbers)) for key, (_, entry) in zip(keys, images, strict=True)
    ]


def matching(
    images: Sequence[Listed],
    sides: Sequence[Hashable],
    apart: tuple[str, ...] = (),
    always: Sequence[str] = ALWAYS_EQUAL,
) -> list[str]:
    """Returns texts that are equal for images of different sides that should be compared.

    Args:
        images: All images.
        sides: What tells the sides apart, such as the run, for each image.
        apart: What the names of settings that may differ begin with.
        always: Settings that are compared in any case. Another one is left out where no two sides share a value of it,
            as when every run has an adapter of its own.
    """
    names = dict.fromkeys(name for _, entry in images for name in entry.settings if not name.startswith(apart))
    compared = [name for name in names if name in always or not _is_tied(name, images, sides)]
    return [_text([entry.settings.get(name) for name in compared]) for _, entry in images]


def _is_tied(name: str, images: Sequence[Listed], sides: Sequence[Hashable]) -> bool:
    found: dict[str, Hashable] = {}
    for (_, entry), side in zip(images, sides, strict=True):
        value = entry.settings.get(name)
        if value is not None and found.setdefault(_text(value), side) != side:
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

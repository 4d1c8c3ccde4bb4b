"""The labelled contact sheets of a job: its images at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from dora_mm.sampling.axes import WITHOUT
from dora_mm.sampling.batch.prompt_row import adapters_text
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import BatchGeneration
from dora_mm.sampling.grids import contact_sheet, image_grid, side_by_side
from dora_mm.sampling.labels import printable_labels
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.progress import tracked

LARGEST_CELL = 384  # pixels: a contact sheet is for looking at all of them, not at one
IMAGES_PER_CONTACT_SHEET = 60
CONTACT_COLUMNS = 6
MOST_COLUMNS = 16  # of a table: more seeds go to another contact sheet
TALLEST = 1.25  # times the width of a contact sheet
Column = tuple[int | None, float]  # the seed and the strength of a column; without a seed rows have it
OWN = ("seed", "strength")  # what a row of a job has several of, which are then its columns
OTHERS = (
    *("adapters", "negative_prompt", "steps", "guidance", "guidance_rescale", "scheduler", "width", "height"),
    *("images", "reference_area"),
)


def save_contact_sheets(generation: BatchGeneration) -> list[Path]:
    """Saves the sheets of a job: sheet.png, or sheet-01.png and so on where there are many images.

    Where all rows were generated with the same seeds and strengths, and with several, those are the columns.

    Returns:
        The files.
    """
    columns = shared_columns(generation.requests)
    pages = table_pages(generation, columns) if columns else contact_pages(generation)
    files = []  # each is generated when it is saved: one of large images has 30 MB, and a long job hundreds of them
    for number, generated in enumerate(tracked(pages, "sheets", "sheets"), 1):
        name = "sheet.png" if len(pages) == 1 else f"sheet-{number:0{max(2, len(str(len(pages))))}d}.png"
        files.append(generation.folder / name)
        save_atomically(files[-1], generated())
    for file in set(generation.folder.glob("sheet*.png")) - set(files):  # of an earlier, larger version of the job
        file.unlink()
    return files


def shared_columns(requests: Sequence[ImageRequest]) -> list[Column]:
    """The pairs of seed and strength that every row of a job has, in order.

    Returns:
        The pairs; none where rows differ in them or have one, or where the seeds of a single row are all that differs.
        With many seeds of a single row each seed is a row of the table, and the pairs have None instead of it.
    """
    found: dict[int, list[Column]] = {}
    for request in requests:
        found.setdefault(request.row, []).append((request.seed, request.strength))
    first, *others = found.values()
    if len(first) == 1 or any(other != first for other in others):
        return []
    strengths = list(dict.fromkeys(strength for _, strength in first))
    if not others and len(strengths) == 1:
        return []
    return [(None, strength) for strength in strengths] if not others and len(first) > MOST_COLUMNS else first


def table_pages(generation: BatchGeneration, columns: Sequence[Column]) -> list[Callable[[], Image.Image]]:
    """The contact sheets of a job with prompts down, and seeds and strengths across."""
    num_strengths = len({strength for _, strength in columns})
    seeds_per_page = max(MOST_COLUMNS // num_strengths, 1)
    num_pages = math.ceil(len(columns) / num_strengths / seeds_per_page)
    width = math.ceil(len(columns) / num_strengths / num_pages) * num_strengths
    height = max(IMAGES_PER_CONTACT_SHEET // width, 1)
    starts = range(0, len(generation.requests), len(columns))  # of the rows
    shown = differing(generation.requests, OTHERS) + (["seed"] if columns[0][0] is None else [])
    labels = printable_labels([label(generation.requests[start], shown) for start in starts])
    pages = []
    for top in range(0, len(starts), height):
        for left in range(0, len(columns), width):
            chosen = columns[left : left + width]
            rows = [range(start + left, start + left + len(chosen)) for start in starts[top : top + height]]
            pages.append(partial(table, generation, rows, labels[top : top + height], chosen))
    return pages


def table(
    generation: BatchGeneration, rows: Sequence[Sequence[int]], labels: Sequence[str], columns: Sequence[Column]
) -> Image.Image:
    """Generates rows of images under common columns; many rows of few images in several blocks side by side."""
    own = differing(generation.requests, OWN)
    heads = [column_label(seed, strength, own) for seed, strength in columns]
    images = [[thumbnail_of(generation, index) for index in row] for row in rows]
    table_image = image_grid(images, labels, heads)
    count = min(math.ceil(math.sqrt(table_image.height / table_image.width / TALLEST)), len(rows))
    size = math.ceil(len(rows) / count)
    starts = range(0, len(rows), size)
    return (
        side_by_side([image_grid(images[i : i + size], labels[i : i + size], heads) for i in starts])
        if count > 1
        else table_image
    )


def contact_pages(generation: BatchGeneration) -> list[Callable[[], Image.Image]]:
    """The contact sheets of a job in reading order."""
    shown = differing(generation.requests, (*OTHERS, *OWN))
    labels = printable_labels([label(request, shown) for request in generation.requests])
    starts = range(0, len(labels), IMAGES_PER_CONTACT_SHEET)
    return [
        partial(contact_page, generation, start, labels[start : start + IMAGES_PER_CONTACT_SHEET]) for start in starts
    ]


def contact_page(generation: BatchGeneration, start: int, labels: Sequence[str]) -> Image.Image:
    """Draws the images of a job from one of them on, with these labels."""
    images = [thumbnail_of(generation, index) for index in range(start, start + len(labels))]
    return contact_sheet(images, labels, columns=CONTACT_COLUMNS)


def differing(requests: Sequence[ImageRequest], names: Sequence[str]) -> list[str]:
    """The settings of which a job has several values."""
    return [name for name in names if len({getattr(request, name) for request in requests}) > 1]


def thumbnail_of(generation: BatchGeneration, index: int) -> Image.Image | None:
    """An image of a job, scaled down to a cell; None if it was not generated."""
    return thumbnail(generation.file(index)) if index in generation.done else None


def thumbnail(file: Path) -> Image.Image:
    """An image, scaled down to a cell."""
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)
    return small


def label(request: ImageRequest, shown: Sequence[str]) -> str:
    """The label of an image or row: its prompt, and the settings that are shown, in words."""
    parts = [request.prompt]
    if "adapters" in shown or "strength" in shown:
        parts += _about_adapters(request, shown)
    texts = {
        "negative_prompt": f"negative: {request.negative_prompt}" if request.negative_prompt else "",
        "steps": f"{request.steps} steps",
        "guidance": f"guidance {request.guidance:g}",
        "guidance_rescale": f"rescale {request.guidance_rescale:g}",
        "scheduler": request.scheduler or "the model's own scheduler",
        "seed": f"seed {request.seed}",
        "images": " + ".join(Path(path).name for path in request.images) or "no reference",
        "reference_area": f"reference area {request.reference_area}",
    }
    if "width" in shown or "height" in shown:
        parts.append(f"{request.width} x {request.height}")
    return ", ".join([*parts, *(text for name, text in texts.items() if name in shown and text)])


def _about_adapters(request: ImageRequest, shown: Sequence[str]) -> list[str]:
    if not request.adapters or ("strength" in shown and not request.active_adapters):
        return [WITHOUT]
    names = [adapters_text(((short_name(path), strength),)) for path, strength in request.adapters]
    found = [" + ".join(filter(None, names))] if "adapters" in shown else []
    return [*found, f"strength {request.strength:g}"] if "strength" in shown else found


def short_name(path: str) -> str:
    """An adapter's path without what all paths have."""
    return path.removeprefix("runs/").removesuffix("/adapter").removesuffix(".safetensors")


def column_label(seed: int | None, strength: float, shown: Sequence[str]) -> str:
    """The label of a column; strength 0 is the base model."""
    texts = {"strength": f"strength {strength:g}" if strength else WITHOUT}
    texts |= {} if seed is None else {"seed": f"seed {seed}"}
    return ", ".join(texts[name] for name in shown if name in texts)


def save_atomically(file: Path, image: Image.Image) -> None:
    """Saves a PNG file atomically."""
    write_atomically(file, lambda partial: image.save(partial, "PNG"))


def save_grid(generation: BatchGeneration, file: Path, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    """Saves the contact sheet of a job whose images are the cells of a grid, row by row."""
    images = [thumbnail_of(generation, index) for index in range(len(generation.requests))]
    width = len(column_labels)
    rows = [images[start : start + width] for start in range(0, len(images), width)]
    save_atomically(file, image_grid(rows, row_labels, column_labels))

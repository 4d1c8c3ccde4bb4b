"""The labelled sheets of a job: its pictures at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dora_mm.sampling.axes import WITHOUT
from dora_mm.sampling.drawing import PictureJob
from dora_mm.sampling.grids import contact_sheet, sheet
from dora_mm.sampling.jobs.picture import Picture
from dora_mm.utils.atomic import write_atomically

LARGEST_CELL = 384  # pixels: a sheet is for looking at all of them, not at one
PICTURES_PER_SHEET = 60
CONTACT_COLUMNS = 6


def save_sheets(job: PictureJob) -> list[Path]:
    """Saves the sheets of a job: sheet.png, or sheet-01.png and so on where there are many pictures.

    Where every row and seed was drawn at the same strengths, and at several, those are the columns.

    Returns:
        The files.
    """
    columns = strength_columns(job.pictures)
    per_row = len(columns) or 1
    per_sheet = max(PICTURES_PER_SHEET // per_row, 1) * per_row
    starts = range(0, len(job.pictures), per_sheet)
    files = []
    for number, start in enumerate(starts, 1):
        indices = range(start, min(start + per_sheet, len(job.pictures)))
        name = "sheet.png" if len(starts) == 1 else f"sheet-{number:0{max(2, len(str(len(starts))))}d}.png"
        files.append(job.folder / name)
        save_atomically(files[-1], draw_sheet(job, indices, columns))
    for file in set(job.folder.glob("sheet*.png")) - set(files):  # of an earlier, larger version of the job
        file.unlink()
    return files


def strength_columns(pictures: Sequence[Picture]) -> list[float]:
    """The strengths that every row and seed of a job has, in order; empty where they differ, or there is one."""
    found: dict[tuple[int, int], list[float]] = {}
    for picture in pictures:
        found.setdefault((picture.row, picture.seed), []).append(picture.strength)
    first, *others = found.values()
    return first if len(first) > 1 and all(other == first for other in others) else []


def draw_sheet(job: PictureJob, indices: Sequence[int], strengths: Sequence[float]) -> Image.Image:
    """Draws a sheet of some pictures of a job, in rows of `strengths`, or in reading order where there are none."""
    pictures = [thumbnail(job.file(index)) if index in job.done else None for index in indices]
    shown = [name for name in ("seed", "strength") if len({getattr(p, name) for p in job.pictures}) > 1]
    if strengths:  # they are the columns
        shown = [name for name in shown if name != "strength"]
    labels = [label(job.pictures[index], shown) for index in indices]
    if not strengths:
        return contact_sheet(pictures, labels, columns=min(CONTACT_COLUMNS, len(pictures)))
    width = len(strengths)
    rows = [pictures[start : start + width] for start in range(0, len(pictures), width)]
    return sheet(rows, labels[::width], [strength_label(strength) for strength in strengths])


def thumbnail(file: Path) -> Image.Image:
    """A picture, scaled down to a cell."""
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)
    return small


def label(picture: Picture, shown: Sequence[str]) -> str:
    """The label of a picture: its prompt, with its seed and its strength where they are shown."""
    texts = {"seed": f"seed {picture.seed}", "strength": strength_label(picture.strength)}
    return ", ".join([picture.prompt, *(texts[name] for name in shown)])


def strength_label(strength: float) -> str:
    """The label of a column; strength 0 is the base model."""
    return f"strength {strength:g}" if strength else WITHOUT


def save_atomically(file: Path, picture: Image.Image) -> None:
    """Saves a PNG file atomically."""
    write_atomically(file, lambda partial: picture.save(partial, "PNG"))


def save_grid(job: PictureJob, file: Path, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    """Saves the sheet of a job whose pictures are the cells of a grid, row by row."""
    pictures = [thumbnail(job.file(index)) if index in job.done else None for index in range(len(job.pictures))]
    width = len(column_labels)
    rows = [pictures[start : start + width] for start in range(0, len(pictures), width)]
    save_atomically(file, sheet(rows, row_labels, column_labels))

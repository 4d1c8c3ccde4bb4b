"""dora-mm unpack: the rows of Parquet files, or of others with images in them, as a folder of images with captions."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dora_mm.config.paths import resolve_path
from dora_mm.data.images.captions import COLUMNS, KEYS, METADATA
from dora_mm.data.images.decoders import MissingDecoderError, open_image
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.readers.hub_files import files_of
from dora_mm.utils.folders import written_at_once
from dora_mm.utils.home import expanded
from dora_mm.utils.shell import quoted

# Names of columns in data sets of images and of edits, the usual ones first
IMAGE_COLUMNS = ("image", "target", "target_image", "edited_image", "output_image", "output", "edited")
TEXT_COLUMNS = (*KEYS, "instruction", "edit_prompt", "edit_instruction", "edit")
REFERENCE_COLUMNS = ("references", *COLUMNS, "reference_image", "original_image", "source", "input", "original")
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}
SUFFIXES |= {"AVIF": ".avif", "HEIF": ".heic"}
REFERENCES = "references"  # the folder of references


def main(
    source: str,
    out: str,
    *,
    image: str | None = None,
    text: str | None = None,
    references: Sequence[str] = (),
    split: str | None = None,
) -> None:
    """Writes the images of rows to a folder, their references beside them, and both with captions to metadata.jsonl.

    Args:
        source: A file, or a folder of files as the hub has them.
        out: The new folder, which `data.folder` reads.
        image: The column of the images; None: the one of `IMAGE_COLUMNS` that is there.
        text: The column of the captions; None: the one of `TEXT_COLUMNS` that is there, if one is.
        references: Columns of references in their order, each with an image or a list of images; none: the one of
            `REFERENCE_COLUMNS` that is there, if one is.
        split: The split of a folder; None: there is but one.

    Raises:
        ValueError: The files cannot be read, a column is missing, or a row has no image.
    """
    files = files_of(resolve_path(source, "IN"), split)
    folder = expanded(out)
    with written_at_once(folder) as partial:
        (partial / REFERENCES).mkdir()
        lines, columns = [], None
        for number, (where, row) in enumerate(chain.from_iterable(map(file_items, files)), 1):
            columns = columns or columns_of(row, image, text, references)
            try:
                lines.append(json.dumps(written(partial, number, row, *columns), ensure_ascii=False) + "\n")
            except ValueError as error:
                raise ValueError(f"{source}, {where}: {error}") from None
        if not any((partial / REFERENCES).iterdir()):
            (partial / REFERENCES).rmdir()
        (partial / METADATA[0]).write_text("".join(lines), encoding="utf-8")
    assert columns is not None  # a file without rows is an error
    named = dict(
        zip(("images", "captions", "references"), (columns[0], columns[1], ", ".join(columns[2])), strict=True)
    )
    print(f"{len(lines)} rows: " + "; ".join(f"{what} of {name}" for what, name in named.items() if name))
    print(f"written   {folder}\nnext      dora-mm new FAMILY NAME --images {quoted(folder)}")


def columns_of(
    row: Any, image: str | None, text: str | None, references: Sequence[str]
) -> tuple[str, str | None, tuple[str, ...]]:
    """The columns of images, captions and references: those that are given, or the usual ones that rows have.

    Raises:
        ValueError: The file has no columns, one that is given is missing, or it is not clear which has the images.
    """
    if not isinstance(row, Mapping):
        raise ValueError("IN has no columns: give a Parquet file, or another whose rows have images")
    listed = ", ".join(map(str, row))
    for option, name in (("--image", image), ("--text", text), *(("--references", each) for each in references)):
        if name is not None and name not in row:
            raise ValueError(f"{option} {name}: there are the columns {listed}")
    found = image or _first(row, IMAGE_COLUMNS)
    if found is None:
        raise ValueError(f"--image is missing: there are the columns {listed}")
    usual = _first(row, [name for name in REFERENCE_COLUMNS if name != found])
    return found, text or _first(row, TEXT_COLUMNS), tuple(references) or ((usual,) if usual else ())


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def written(
    folder: Path, number: int, row: Mapping[str, Any], image: str, text: str | None, references: Sequence[str]
) -> dict[str, Any]:
    """Writes the images of a row, and returns its line of metadata.

    Raises:
        ValueError: It has no image, or one that is none.
    """
    (target,) = [*images_in(row[image], image)][:1] or [None]
    if target is None:
        raise ValueError(f"{image} is empty")
    found = {"file_name": write_image(folder, f"{number:06d}", target, image)}
    if text is not None and row.get(text):
        found["text"] = row[text]
    seen = [(name, content) for name in references for content in images_in(row.get(name), name)]
    names = [
        write_image(folder, f"{REFERENCES}/{number:06d}_{index}", content, name)
        for index, (name, content) in enumerate(seen, 1)
    ]
    return {**found, **({REFERENCES: names} if names else {})}


def images_in(cell: Any, column: str) -> Iterator[bytes]:
    """The files of images in a cell: bytes, a struct of `datasets` with `bytes`, or a list of these.

    Raises:
        ValueError: It has something else, such as the path of a file.
    """
    if isinstance(cell, list | tuple):
        for each in cell:
            yield from images_in(each, column)
    elif cell is not None:
        content = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(content, bytes):
            raise ValueError(f"{column} has no image in the file, but {str(cell)[:60]!r}")
        yield content


def write_image(folder: Path, stem: str, content: bytes, column: str) -> str:
    """Writes the file of an image as it is, and returns its name in the folder.

    Raises:
        ValueError: It is no image of a format that trainings read.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            suffix = SUFFIXES[str(image.format)]
    except MissingDecoderError as error:
        raise ValueError(f"{column}: {error}") from None
    except Exception:  # whatever Pillow raises of damaged files
        raise ValueError(f"{column} has no image of {', '.join(SUFFIXES)}") from None
    (folder / f"{stem}{suffix}").write_bytes(content)
    return f"{stem}{suffix}"

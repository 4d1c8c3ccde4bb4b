"""The folder of a gallery: the page, the images, and small versions of large ones."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from PIL import Image

from dora_mm.config.schema import PipelineConfig
from dora_mm.sampling.gallery.data import NOTHING_SHOWN, Listed, ShownImage, gallery_data, json_value
from dora_mm.sampling.gallery.losses import losses_by_example
from dora_mm.sampling.gallery.page import GENERATOR, page
from dora_mm.sampling.gallery.thumbnails import SIDE, Thumbnails
from dora_mm.sampling.gallery.training import about_training, read_images, training_config, training_images
from dora_mm.sampling.manifest import MANIFEST, ManifestEntry
from dora_mm.utils.atomic import write_text
from dora_mm.utils.example_losses import ExampleLoss
from dora_mm.utils.folders import complete, link_or_copy, partial_folder
from dora_mm.utils.partials import partial_of
from dora_mm.utils.progress import tracked

log = logging.getLogger(__name__)
GALLERY, INDEX, IMAGES, THUMBNAILS = "gallery", "index.html", "pictures", "thumbnails"
OWN = {INDEX, IMAGES, THUMBNAILS}
LEFT_BY_DESKTOPS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # in every folder that was looked at
FORMATS = {"PNG": (".png",), "WEBP": (".webp",), "JPEG": (".jpg", ".jpeg")}  # a browser shows all of them
SUFFIXES = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
MOST_PIXELS = 80_000_000  # as of images that are trained on
NOT_A_IMAGE = "its file is not a whole PNG, WebP or JPEG image"


def write_gallery(runs: Mapping[Path, Sequence[ManifestEntry]], folder: Path) -> Path:
    """Writes a gallery, completely or not at all; an earlier gallery in the same folder is replaced.

    An image that is in a manifest but cannot be read is listed with the reason. Of a training the page also has the
    curves, the settings, some training images and what to type next.

    Args:
        runs: The entries of each run directory, as `read_images` returns them.
        folder: Where to write: a folder that does not exist, is empty, or holds an earlier gallery.

    Returns:
        The path of the page.

    Raises:
        ValueError: The folder holds something else, or a manifest names a file outside of its run.
    """
    with _replacing(folder) as partial:
        fill_gallery(runs, partial, folder)
    return folder / INDEX


def fill_gallery(
    runs: Mapping[Path, Sequence[ManifestEntry]],
    folder: Path,
    earlier: Path,
    summaries: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
    *,
    anywhere: bool = False,
) -> None:
    """Writes the files of a gallery into a folder.

    Args:
        runs: As in `write_gallery`.
        folder: A folder without any of them.
        earlier: Where the earlier gallery is, whose thumbnails are taken over, if there is one.
        summaries: Those of trainings that write them after the page, by their run directories.
        anywhere: Whether training images outside of the current folder are shown: configs may be somebody else's.

    Raises:
        ValueError: A manifest names a file outside of its run.
    """
    for run, entries in runs.items():
        _check_files(run, entries)
    thumbnails = Thumbnails(folder / THUMBNAILS, earlier / THUMBNAILS)
    added = _add_all(runs, folder, thumbnails)
    data = gallery_data([image for image, _ in added], [shown for _, shown in added])
    configs = {run: config for run in runs if (config := training_config(run))}
    trainings = [
        _add_training(run, config, folder, thumbnails, summaries.get(run), anywhere=anywhere)
        for run, config in configs.items()
    ]
    write_text(folder / INDEX, page({**data, "trainings": json_value(trainings)}))


def update_page(run: Path, summary: Mapping[str, Any] | None = None) -> None:
    """Writes the gallery of a training in its run directory; where that cannot be, the training goes on without.

    Args:
        run: The run directory.
        summary: Of one that has ended, which writes it after the page; None: it goes on.
    """
    new = not (run / GALLERY / INDEX).exists()
    try:
        with _replacing(run / GALLERY) as partial:
            summaries = {run: summary} if summary else {}
            fill_gallery({run: read_images(run)}, partial, run / GALLERY, summaries, anywhere=True)
        page = run / GALLERY / INDEX
        log.log(logging.INFO if new else logging.DEBUG, "page     %s, written anew with each contact sheet", page)
    except (OSError, ValueError) as error:  # a full disk, a file of somebody's in the folder
        log.warning("The page of the training was not written: %s", error)


def _add_training(
    run: Path,
    config: PipelineConfig,
    folder: Path,
    thumbnails: Thumbnails,
    summary: Mapping[str, Any] | None,
    *,
    anywhere: bool,
) -> dict[str, Any]:
    """Data of a training for the page, with its training images, whose missing thumbnails are made."""
    pairs, note = training_images(config, anywhere=anywhere)
    images = [
        {"name": source.name, "file": _address(file, folder), "references": _thumbnails(references, folder, thumbnails)}
        for source, references in pairs.items()
        if (file := _thumbnail(source, thumbnails))
    ]
    about = about_training(run, config, summary)

    def shown(row: ExampleLoss) -> str | None:
        """The image of a row, as it was: see `_references`."""
        source = Path(row.path)
        if source.suffix.lower() not in SUFFIXES or _digest(source) != row.digest:
            return None
        return _address(file, folder) if (file := _thumbnail(source, thumbnails)) else None

    return {**about, "images": images, "note": note, "losses": losses_by_example(run, about["done"], shown)}


def _thumbnails(sources: Iterable[Path], folder: Path, thumbnails: Thumbnails) -> list[str]:
    """The addresses of the thumbnails of images, but for those that cannot be read."""
    found = [_thumbnail(source, thumbnails) for source in sources]
    return [_address(file, folder) for file in found if file]


def _thumbnail(source: Path, thumbnails: Thumbnails) -> Path | None:
    """The thumbnail of an image, made where it is missing; None: it cannot be read."""
    if not source.is_file():
        return None
    file = thumbnails.path(source)
    if not thumbnails.has(file):
        if (image := _read(source)) is None:
            return None
        thumbnails.add(file, image)
    return file


def _references(entry: ManifestEntry) -> list[Path]:
    """The references of an image, as they were: a manifest of somebody else's must not show other files."""
    paths, digests = (entry.settings.get(name) for name in ("images", "image_digests"))
    if not isinstance(paths, list) or not isinstance(digests, list):
        return []
    known = [(Path(path), digest) for path, digest in zip(paths, digests, strict=False) if isinstance(path, str)]
    return [path for path, digest in known if path.suffix.lower() in SUFFIXES and _digest(path) == digest]


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    try:  # that of utils/digest.py imports torch
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # a NUL byte in the path
        return None


def _check_files(run: Path, entries: Sequence[ManifestEntry]) -> None:
    """Metadata must not lead out of its folder: a gallery may be sent to others."""
    root = run.resolve()
    for entry in entries:
        if entry.status == "done" and not (root / entry.file).resolve().is_relative_to(root):
            raise ValueError(f"{run / MANIFEST} names a file outside of the run: {entry.file}")


# --- images ---------------------------------------------------------------------------------------------------------


def _add_all(
    runs: Mapping[Path, Sequence[ManifestEntry]], folder: Path, thumbnails: Thumbnails
) -> list[tuple[Listed, ShownImage]]:
    with ThreadPoolExecutor() as threads:  # Pillow lets others run while it decodes, scales and encodes
        added = [
            threads.submit(_add, run, number, entry, folder, thumbnails)
            for number, (run, entries) in enumerate(runs.items(), 1)
            for entry in entries
        ]
        try:
            return [future.result() for future in tracked(added, "gallery", "pictures")]
        except BaseException:  # Ctrl-C, a full disk: do not wait for the rest
            threads.shutdown(cancel_futures=True)
            raise


def _add(
    run: Path, number: int, entry: ManifestEntry, folder: Path, thumbnails: Thumbnails
) -> tuple[Listed, ShownImage]:
    """Puts the image of an entry into the folder, with a thumbnail if it is large.

    Returns:
        The entry, which has the reason where there is no image, and what the page shows of it.
    """
    if entry.status != "done":
        return (str(run), entry), NOTHING_SHOWN
    source = (run / entry.file).resolve()
    name = Path(str(number), source.relative_to(run.resolve()))
    if not source.is_file():
        entry = replace(entry, status="missing", reason="its file is not there any more")
        return (str(run), entry), NOTHING_SHOWN
    small = thumbnails.path(source)
    known = thumbnails.has(small)  # then it was decoded before
    image = _read(source, decode=not known)
    if image is None:
        return (str(run), replace(entry, status="failed", reason=NOT_A_IMAGE)), NOTHING_SHOWN
    copy = folder / IMAGES / name
    if not copy.exists():  # two entries may name the same file
        link_or_copy(source, copy)
    file = thumbnail = _address(copy, folder)
    if max(image.size) > SIDE:
        if not known:
            thumbnails.add(small, image)
        thumbnail = _address(small, folder)
    return (str(run), entry), (file, thumbnail, image.size, _thumbnails(_references(entry), folder, thumbnails))


def _read(path: Path, *, decode: bool = True) -> Image.Image | None:
    """The image; None where there is none, or where a browser would take the file for something else."""
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            if decode:
                image.load()
            return image if path.suffix.lower() in FORMATS[str(image.format)] else None
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError):  # whatever Pillow raises
        return None


def _address(path: Path, folder: Path) -> str:
    """The address of a file in the folder of the gallery, relative to the page."""
    return quote(os.fsencode(path.relative_to(folder).as_posix()))


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a new folder next to `folder`, which replaces it when the context ends without an error."""
    _check_folder(folder)
    folder = folder.resolve()
    with partial_folder(folder) as partial:
        yield partial
        complete(partial)
        with partial_of(folder.with_name(f"{folder.name}.old"), is_folder=True) as old:
            if folder.exists():
                os.replace(folder, old / folder.name)
            try:
                os.replace(partial, folder)
            except BaseException:  # the earlier one would go with its temporary folder
                if (old / folder.name).exists():
                    os.replace(old / folder.name, folder)
                raise


def _check_folder(folder: Path) -> None:
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"output {folder} is inside of a file, {parent}: choose another folder")
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()} - LEFT_BY_DESKTOPS
        if not names or (INDEX in names and names <= OWN and GENERATOR in _head(folder / INDEX)):
            return
    elif not folder.exists():
        return
    raise ValueError(f"output {folder} holds something else than a gallery: choose another folder")


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(4096).decode("utf-8", "replace")

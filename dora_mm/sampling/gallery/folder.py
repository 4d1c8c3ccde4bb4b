"""The folder of a gallery: the page, the pictures, and small versions of large ones."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dora_mm.sampling.gallery.data import GalleryPicture, gallery_data
from dora_mm.sampling.gallery.page import GENERATOR, page
from dora_mm.sampling.manifest import MANIFEST, ManifestEntry
from dora_mm.utils.atomic import write_text
from dora_mm.utils.folders import link_or_copy
from dora_mm.utils.progress import tracked

INDEX, PICTURES, THUMBNAILS = "index.html", "pictures", "thumbnails"
OWN = {INDEX, PICTURES, THUMBNAILS}
LEFT_BY_DESKTOPS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # in every folder that was looked at
FORMATS = {"PNG": (".png",), "WEBP": (".webp",), "JPEG": (".jpg", ".jpeg")}  # a browser shows all of them
NOT_A_PICTURE = "its file is not a whole PNG, WebP or JPEG picture"
SIDE = 512  # pixels of a thumbnail's longer side: sharp on a screen of twice the density; some 25 kB


def write_gallery(runs: Mapping[Path, Sequence[ManifestEntry]], folder: Path) -> Path:
    """Writes a gallery, completely or not at all; an earlier gallery in the same folder is replaced.

    A picture that is in a manifest but cannot be read is listed with the reason.

    Args:
        runs: The entries of each run directory, as `read_manifest` returns them.
        folder: Where to write: a folder that does not exist, is empty, or holds an earlier gallery.

    Returns:
        The path of the page.

    Raises:
        ValueError: The folder holds something else, or a manifest names a file outside of its run.
    """
    for run, entries in runs.items():
        _check_files(run, entries)
    with _replacing(folder) as partial:
        write_text(partial / INDEX, page(gallery_data(_add_all(runs, partial))))
    return folder / INDEX


def _check_files(run: Path, entries: Sequence[ManifestEntry]) -> None:
    """Metadata must not lead out of its folder: a gallery may be sent to others."""
    root = run.resolve()
    for entry in entries:
        if entry.status == "done" and not (root / entry.file).resolve().is_relative_to(root):
            raise ValueError(f"{run / MANIFEST} names a file outside of the run: {entry.file}")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _add_all(runs: Mapping[Path, Sequence[ManifestEntry]], folder: Path) -> list[GalleryPicture]:
    with ThreadPoolExecutor() as threads:  # Pillow lets others run while it decodes, scales and encodes
        added = [
            threads.submit(_add, run, number, entry, folder)
            for number, (run, entries) in enumerate(runs.items(), 1)
            for entry in entries
        ]
        try:
            return [future.result() for future in tracked(added, "gallery", "pictures")]
        except BaseException:  # Ctrl-C, a full disk: do not wait for the rest
            threads.shutdown(cancel_futures=True)
            raise


def _add(run: Path, number: int, entry: ManifestEntry, folder: Path) -> GalleryPicture:
    """Puts the picture of an entry into the folder, with a thumbnail if it is large."""
    if entry.status != "done":
        return GalleryPicture(str(run), entry)
    source = (run / entry.file).resolve()
    name = Path(str(number), source.relative_to(run.resolve()))
    if not source.is_file():
        return GalleryPicture(str(run), replace(entry, status="missing", reason="its file is not there any more"))
    image = _read(source)
    if image is None:
        return GalleryPicture(str(run), replace(entry, status="failed", reason=NOT_A_PICTURE))
    if not (folder / PICTURES / name).exists():  # two entries may name the same file
        link_or_copy(source, folder / PICTURES / name)
    file = thumbnail = _address(PICTURES, name)
    if max(image.size) > SIDE:
        small = name.with_name(f"{name.name}.webp")
        _save_thumbnail(image, folder / THUMBNAILS / small)
        thumbnail = _address(THUMBNAILS, small)
    return GalleryPicture(str(run), entry, file, thumbnail, image.size)


def _read(path: Path) -> Image.Image | None:
    """The decoded picture; None where there is none, or where a browser would take the file for something else."""
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            image.load()
            return image if path.suffix.lower() in FORMATS[str(image.format)] else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # whatever Pillow raises
        return None


def _save_thumbnail(image: Image.Image, path: Path) -> None:
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, "WEBP", quality=82, method=2)


def _address(folder: str, name: Path) -> str:
    return quote(os.fsencode(Path(folder, name).as_posix()))


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder`, which takes its place when the context ends without an error."""
    _check_folder(folder)
    folder = folder.resolve()
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for left in (partial, old):  # by a command that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

"""The files of folders of images, of which no image is opened."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dora_mm.config import resolve_path
from dora_mm.config.images import DataConfig
from dora_mm.data.images.captions import CAPTION_SUFFIXES, CaptionFiles, is_metadata
from dora_mm.data.images.decoders import SUFFIXES
from dora_mm.data.images.masks import by_kind
from dora_mm.data.images.references import ReferenceFiles
from dora_mm.utils.folders import REFUSED, Links, check_entry


def image_files(data: DataConfig) -> dict[Path, tuple[Path, ...]]:
    """The image files of all folders that are trained on, each with its references.

    Raises:
        ValueError: A folder is missing or cannot be read.
    """
    found: dict[Path, tuple[Path, ...]] = {}  # a folder may be given twice
    listed_in = partial(files_in, subfolders=data.subfolders, links=data.links)
    for key, folder in data.all_folders.items():
        if folder.role == "train":
            root = resolve_path(folder.path, key)
            masks = [resolve_path(folder.masks, f"{key}.masks")] if folder.masks else []
            references = [resolve_path(path, f"{key}.references") for path in folder.references]
            entries = listed_in(root, key, *masks, *references)
            rows = CaptionFiles(root, [path for path in entries if is_metadata(path.name)], links=data.links).rows
            listed = {path: row.references for path, row in rows.items()}
            images = sorted(by_kind(entries).images - only_references(listed))
            folders = [(each, listed_in(each, key)) for each in references]
            files = ReferenceFiles(images, listed, folders, root)
            found |= {image: files.of_image(image) for image in images}
    return found


def only_references(listed: Mapping[Path, tuple[Path, ...]]) -> set[Path]:
    """The images that rows of metadata files name as references, and that have no row of their own."""
    return {path for found in listed.values() for path in found} - listed.keys()


def files_in(folder: Path, key: str, *without: Path, subfolders: bool, links: Links = REFUSED) -> list[Path]:
    """The entries of a folder, and of its subfolders where these count, but for some.

    Raises:
        ValueError: As in `entries_of`; or an image or a caption is a link that leads out of the folder.
    """
    folders = folders_in(folder, *without) if subfolders else [folder]
    entries = [path for each in folders for path in entries_of(each, key)]
    for path in entries:
        is_read = path.name.lower().endswith((*SUFFIXES, *CAPTION_SUFFIXES)) or is_metadata(path.name)
        if is_read and path.is_symlink():
            try:
                check_entry(path, folder, links)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return entries


def folders_in(root: Path, *without: Path) -> list[Path]:
    """The folder and all of its subfolders, but for hidden and linked ones, and for some folders."""
    found, left_out = [], {folder.resolve() for folder in without}
    for folder, names, _ in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith(".") and Path(folder, n).resolve() not in left_out)
        found.append(Path(folder))
    return found or [root]  # a path that is no folder gives none, and is reported when it is listed


def entries_of(folder: Path, key: str) -> list[Path]:
    """The entries of a folder, sorted by name.

    Raises:
        ValueError: It is no folder, or cannot be read; the message names the key of the config.
    """
    if not folder.is_dir():
        raise ValueError(f"{key}: {folder} is not a folder")
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)  # faster than comparing whole paths
    except OSError as error:
        raise ValueError(f"{key}: {folder} cannot be read: {error.strerror}") from None

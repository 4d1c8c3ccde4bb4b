"""The files of folders of images, by their names alone."""

import os
from pathlib import Path

from dora_mm.config import resolve_path
from dora_mm.config.images import DataConfig
from dora_mm.data.images.masks import by_kind


def image_files(data: DataConfig) -> list[Path]:
    """The image files of all folders that are trained on, by their names alone: nothing is opened.

    Raises:
        ValueError: A folder is missing or cannot be read.
    """
    found = []
    for key, folder in data.all_folders.items():
        if folder.role == "train":
            root = resolve_path(folder.path, key)
            others = [(folder.masks, f"{key}.masks")] if folder.masks else []
            others += [(path, f"{key}.references") for path in folder.references]
            without = [resolve_path(path, key) for path, key in others]
            folders = folders_in(root, *without) if data.subfolders else [root]
            found += sorted(by_kind(path for each in folders for path in entries_of(each, key)).images)
    return list(dict.fromkeys(found))  # a folder may be given twice


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

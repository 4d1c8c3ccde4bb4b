"""The image files of a data set: folders are listed once instead of checking the disk for each of 440,000 rows."""

import os
import posixpath
from functools import cached_property
from pathlib import Path

from dora_mm.config.paths import resolve_path
from dora_mm.data.vl.example import stem


def image_path(folder: str | None, name: str) -> Path:
    """The file of an image of an example.

    Args:
        folder: The folder of the images; None where rows name absolute paths.
        name: The name of the image in the example.
    """
    return resolve_path(folder, "images") / name if folder else resolve_path(name)


class ImageFolder:
    """The files of a folder and its subfolders, by file name; COCO's train2014 and val2014 may be in one folder.

    Args:
        folder: The folder; links to folders are followed. None: only absolute paths are found.

    Raises:
        ValueError: `folder` is not a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: list[str] = []  # relative to the folder; top-down: files of the folder itself come first
        self._listed: dict[str, set[str]] = {}  # the files of other folders, which absolute paths name
        if folder is None:
            return
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        for root, _, names in os.walk(folder, followlinks=True):
            subfolder = Path(root).relative_to(folder).as_posix()
            self._files += names if subfolder == "." else [f"{subfolder}/{name}" for name in names]

    def find(self, name: str) -> str | None:
        """The path of a file, by its file name or stem, its path relative to the folder, or its absolute path.

        A name without folders may be that of a file in a subfolder; a file in the folder itself takes precedence.

        Returns:
            The path, relative to the folder unless `name` is absolute; None if there is no such file, or if several
            files in subfolders have a name that is given without folders.
        """
        if name in self._paths:
            return name
        if "/" not in name:
            paths = self._by_name.get(name, ())
            return paths[0] if paths and (len(paths) == 1 or "/" not in paths[0]) else None
        if os.path.isabs(name):
            folder, _, file = name.rpartition("/")
            return name if file in self._files_of(folder or "/") else None
        path = posixpath.normpath(name)
        return path if path in self._paths else None

    @cached_property
    def _paths(self) -> frozenset[str]:
        return frozenset(self._files)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """The paths by file name, and by stem, because clips are named without extension."""
        found: dict[str, list[str]] = {}
        for path in self._files:
            for key in {path.rpartition("/")[2], stem(path)}:
                found.setdefault(key, []).append(path)
        return found

    def _files_of(self, folder: str) -> set[str]:
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # does not exist, may not be entered, or has a NUL in its name
                self._listed[folder] = set()
        return self._listed[folder]

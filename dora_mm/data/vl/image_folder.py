"""The image files of a data set: folders are listed once instead of checking the disk for each of 440,000 rows."""

import os
import posixpath
from pathlib import Path

from dora_mm.data.vl.example import stem


class ImageFolder:
    """The files of a folder and its subfolders, by file name; COCO's train2014 and val2014 may be in one folder.

    Args:
        folder: The folder; links to folders are followed. None: only absolute paths are found.

    Raises:
        ValueError: `folder` is not a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._paths: dict[str, list[str]] = {}  # by file name, and by stem, because clips are named without extension
        self._listed: dict[str, set[str]] = {}  # the files of other folders, which absolute paths name
        if folder is None:
            return
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        for root, _, names in os.walk(folder, followlinks=True):  # top-down: files of the folder itself come first
            subfolder = Path(root).relative_to(folder).as_posix()
            for name in names:
                for key in {name, stem(name)}:
                    self._paths.setdefault(key, []).append(name if subfolder == "." else f"{subfolder}/{name}")

    def find(self, name: str) -> str | None:
        """The path of a file, by its file name or stem, its path relative to the folder, or its absolute path.

        A name without folders may be that of a file in a subfolder; a file in the folder itself takes precedence.

        Returns:
            The path, relative to the folder unless `name` is absolute; None if there is no such file, or if several
            files in subfolders have a name that is given without folders.
        """
        if "/" in name:
            return self._find_path(name)
        paths = self._paths.get(name, ())
        return paths[0] if paths and (len(paths) == 1 or "/" not in paths[0]) else None

    def _find_path(self, name: str) -> str | None:
        if os.path.isabs(name):
            folder, _, file = name.rpartition("/")
            return name if file in self._files(folder or "/") else None
        path = posixpath.normpath(name)
        return path if path in self._paths.get(path.rpartition("/")[2], ()) else None

    def _files(self, folder: str) -> set[str]:
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # does not exist, may not be entered, or has a NUL in its name
                self._listed[folder] = set()
        return self._listed[folder]

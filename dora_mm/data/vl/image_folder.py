"""The image files of a data set: the folder is listed once instead of checking the disk for each of 440,000 rows."""

import os
from pathlib import Path

from dora_mm.data.vl.example import stem


class ImageFolder:
    """The files of a folder and its subfolders, by file name; COCO's train2014 and val2014 may be in one folder.

    Args:
        folder: The folder; links to folders are followed.

    Raises:
        ValueError: `folder` is not a folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        self._paths: dict[str, list[str]] = {}  # by file name, and by stem, because clips are named without extension
        for root, _, names in os.walk(folder, followlinks=True):  # top-down: files of the folder itself come first
            subfolder = Path(root).relative_to(folder).as_posix()
            for name in names:
                for key in {name, stem(name)}:
                    self._paths.setdefault(key, []).append(name if subfolder == "." else f"{subfolder}/{name}")

    def find(self, name: str) -> str | None:
        """The path of a file relative to the folder, by its file name or stem.

        A file in the folder itself takes precedence over files in subfolders.

        Returns:
            The relative path, or None if no file or several files in subfolders have this name.
        """
        paths = self._paths.get(name, ())
        return paths[0] if paths and (len(paths) == 1 or "/" not in paths[0]) else None

"""Where the pictures of a data set are: its folder listed once, not one look at the disk for each of 440,000 rows."""

import os
from pathlib import Path

from dora_mm.data.vl.example import stem

__all__ = ["Pictures"]


class Pictures:
    """The files of a folder and its subfolders, by file name: COCO's train2014 and val2014 lie beside each other.

    Raises:
        ValueError: it is no folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder of pictures")
        self._paths: dict[str, list[str]] = {}  # by file name; by its stem as well, which is how clips are named
        for root, _, names in os.walk(folder, followlinks=True):  # from the top down
            subfolder = Path(root).relative_to(folder).as_posix()
            for name in names:
                for key in {name, stem(name)}:
                    self._paths.setdefault(key, []).append(name if subfolder == "." else f"{subfolder}/{name}")

    def find(self, name: str) -> str | None:
        """The path within the folder; a file in the folder itself is taken before those in subfolders.

        None where no file has the name, or several subfolders have one.
        """
        paths = self._paths.get(name, ())
        return paths[0] if paths and (len(paths) == 1 or "/" not in paths[0]) else None

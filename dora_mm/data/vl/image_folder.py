"""The image files of a data set: folders are listed once instead of checking the disk for each of 440,000 rows."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import cast

from dora_mm.config.paths import find_path, resolve_path
from dora_mm.data.vl.example import stem
from dora_mm.utils.folders import REFUSED, Links, inside

LOOKED_FOR = 20  # images, where a folder has none
MOST_BEHIND_LINKS = 1_000_000  # files and folders: a few links to each other show any number


def image_path(folder: str | None, name: str) -> Path:
    """The file of an image of an example.

    Args:
        folder: The folder of the images; None where rows name absolute paths.
        name: The name of the image in the example.
    """
    return resolve_path(folder, "images") / name if folder else resolve_path(name)


def folder_with(names: Sequence[str], file: Path, given: str | None) -> Path | None:
    """A folder near a data file in which an image of it is, by its path there; None: none of those tried has any.

    Tried are the folders that the file is in, the current one, and the folders in these and in the given one.

    Args:
        names: Names of images in the file; the first ones are looked for.
        file: The data file.
        given: The folder that has none of them; None: none is given.
    """
    here, relative = Path.cwd(), [name for name in names[:LOOKED_FOR] if not os.path.isabs(name)]
    above = [folder for folder in file.absolute().parents if folder.is_relative_to(here)] or [file.absolute().parent]
    near = [*above, here, *([resolve_path(given)] if given and find_path(given) else [])]
    within = [folder / name for folder in near for name, is_folder, _ in sorted(_entries(folder)) if is_folder]
    for folder in dict.fromkeys([*near, *within]):
        if any((folder / name).is_file() for name in relative):
            return Path(os.path.relpath(folder)) if folder.is_relative_to(here) else folder
    return None


class ImageFolder:
    """The files of a folder and its subfolders, by file name; COCO's train2014 and val2014 may be in one folder.

    Names are those of somebody else's table, and find no file outside of the folder: see `inside`.

    Args:
        folder: The folder. None: only absolute paths are found.
        others: Further folders in which absolute paths are found, such as that of metadata which names files beside it.
        links: What becomes of links that lead out of a folder; those to folders in it are followed.
        anywhere: Whether absolute paths may be those of any file.
        remedy: What to do about an absolute path, for messages.

    Raises:
        ValueError: `folder` is not a folder.
    """

    def __init__(
        self,
        folder: Path | None,
        others: Sequence[Path] = (),
        links: Links = REFUSED,
        *,
        anywhere: bool = False,
        remedy: str = "name the folder that it is in",
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        self._folder, self._links, self._anywhere, self._remedy = folder, links, anywhere, remedy
        self._roots = [*others] if folder is None else [folder, *others]
        self._listed: dict[str, dict[str, bool]] = {}  # the files of folders that absolute paths name, as `_files`
        self._named: dict[str, bool] = {}  # whether these folders are ours
        self._left_out: set[str] = set()  # links to folders that are not followed

    def find(self, name: str) -> str | None:
        """The path of a file, by its file name or stem, its path relative to the folder, or its absolute path.

        A name without folders may be that of a file in a subfolder; a file in the folder itself takes precedence.

        Returns:
            The path, relative to the folder unless `name` is absolute; None if there is no such file, if it may not be
            read (see `refusal`), or if several files in subfolders have a name that is given without folders.

        Raises:
            ValueError: There are very many files behind links to folders.
        """
        path = self._path(name)
        return None if path is None or self._refusal(path) else path

    def refusal(self, name: str) -> str:
        """Why the file of a name may not be read, to follow the name; empty: it may, or there is none."""
        path = self._path(name)
        if path is not None:
            return self._refusal(path)
        if "/" not in name and len(found := self._by_name.get(name, ())) > 1:
            return f"is in several folders in {self._folder} ({found[0]}, {found[1]}): name it with its folder"
        if not any(name.startswith(f"{link}/") or "/" not in name for link in self._left_out):
            return ""
        return f"is not in {self._folder}, whose links to folders lead out of it: {self._links.remedy}"

    def _refusal(self, path: str) -> str:
        folder, _, file = path.rpartition("/")
        if not os.path.isabs(path):
            is_inside = not self._files[path] or _is_inside(cast(Path, self._folder), path, self._links)
        elif self._anywhere:
            return ""
        elif not self._is_named(folder):
            return f"is an absolute path{f', and not in {self._folder}' if self._folder else ''}: {self._remedy}"
        else:
            is_inside = not self._files_of(folder)[file] or self._are_inside(path)
        return "" if is_inside else f"is a link that leads out of its folder: {self._links.remedy}"

    def listed(self) -> "ImageFolder":
        """This, after its folder has been read."""
        _ = self._files
        return self

    def _is_named(self, folder: str) -> bool:
        """Whether an absolute path is that of one of the folders or of a subfolder, by name alone."""
        if folder not in self._named:
            path = Path(os.path.normpath(folder or "/"))
            self._named[folder] = any(path.is_relative_to(os.path.abspath(root)) for root in self._roots)
        return self._named[folder]

    def _are_inside(self, path: str) -> bool:
        """Whether an absolute path, and what it links to, is in one of the folders."""
        return any(_is_inside(root, path, self._links) for root in self._roots)

    def _path(self, name: str) -> str | None:
        """As `find`, whether or not the file may be read."""
        if os.path.isabs(name):
            folder, _, file = name.rpartition("/")
            return name if file in self._files_of(folder) else None
        if name in self._files:
            return name
        if "/" not in name:
            paths = self._by_name.get(name, ())
            return paths[0] if paths and (len(paths) == 1 or "/" not in paths[0]) else None
        path = posixpath.normpath(name)
        return path if path in self._files else None

    @cached_property
    def _files(self) -> dict[str, bool]:
        """The files by their paths in the folder, top-down, and whether a link is on the way to each."""
        return {} if self._folder is None else dict(self._walk(self._folder))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """The paths by file name, and by stem, because clips are named without extension."""
        found: dict[str, list[str]] = {}
        for path in self._files:
            for key in {path.rpartition("/")[2], stem(path)}:
                found.setdefault(key, []).append(path)
        return found

    def _files_of(self, folder: str) -> dict[str, bool]:
        """The files of a folder that absolute paths name, and whether a link is on the way to each."""
        if folder not in self._listed:
            behind, entries = not self._are_inside(folder or "/"), _entries(folder or "/")
            self._listed[folder] = {name: is_link or behind for name, is_folder, is_link in entries if not is_folder}
        return self._listed[folder]

    def _walk(self, folder: Path) -> Iterator[tuple[str, bool]]:
        """As `_files`. Links to folders are entered, but not from within themselves."""
        root, behind = os.path.realpath(folder), 0
        waiting: list[tuple[str, tuple[str, ...]]] = [("", (root,))]  # a folder, and where links above it lead
        while waiting:
            parent, above = waiting.pop()
            for name, is_folder, is_link in _entries(folder / parent):
                path = f"{parent}/{name}" if parent else name
                behind += len(above) > 1
                if behind > MOST_BEHIND_LINKS and not self._links.follow:
                    raise ValueError(
                        f"{folder}: links to folders show more than {MOST_BEHIND_LINKS:,} files: remove some"
                    )
                if not is_folder:
                    yield path, is_link or len(above) > 1
                elif not is_link:
                    waiting.append((path, above))
                elif not _is_inside(folder, path, self._links):
                    self._left_out.add(path)
                elif (real := os.path.realpath(folder / path)) not in above:
                    waiting.append((path, (*above, real)))


def _is_inside(root: Path, path: str | Path, links: Links) -> bool:
    try:
        inside(root, path, links)
    except ValueError:
        return False
    return True


def _entries(folder: str | Path) -> Iterator[tuple[str, bool, bool]]:
    """The names of files and folders in a folder, whether each is a folder, and whether it is a link."""
    with suppress(OSError, ValueError), os.scandir(folder) as entries:  # none, may not be entered, a NUL in its name
        for entry in entries:
            with suppress(OSError):  # a loop of links
                if entry.is_dir() or entry.is_file():
                    yield entry.name, entry.is_dir(), entry.is_symlink()

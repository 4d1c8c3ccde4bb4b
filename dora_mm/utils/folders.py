"""Folders that appear complete or not at all, under a name that nothing has: given ones, and numbered ones of runs."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dora_mm.utils.atomic import already_there, flush, is_same_file, reserve
from dora_mm.utils.home import expanded
from dora_mm.utils.lock import make_folder
from dora_mm.utils.partials import partial_of

BEGUN = ".begun"  # the first file of a folder that is being filled: writers make missing folders, a removed one, too


def new_folder(name: str, output: str | None = None, fill: Callable[[Path], object] = lambda folder: None) -> Path:
    """Makes a folder, which appears with its content: `output`, or the next number in runs/`name`.

    Args:
        name: Of the runs that are numbered.
        output: The folder instead; None: a number.
        fill: Called with the temporary folder, to which it writes the content.

    Returns:
        The folder.

    Raises:
        ValueError: `output` exists already, or its parent is a file.
    """
    path = Path("runs", name, "new") if output is None else expanded(output)
    if output is not None and not is_free(path):
        raise ValueError(
            f"output {path} exists already: choose another folder, or leave output out to get a numbered one."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output {path} is inside a file, not a folder: choose another folder.") from None
    except FileNotFoundError:  # its parents were made, so this is a place such as /proc, where there are no new folders
        raise ValueError(f"output {path} cannot be made there: choose another folder.") from None
    with partial_folder(path) as partial:
        fill(partial)
        complete(partial)
        if output is None:
            path = _reserve_number(partial, path.parent)
        else:
            reserve(partial, path)
    flush(path.parent)
    return path


def _reserve_number(partial: Path, parent: Path) -> Path:
    """Gives a folder the next number, so that two runs that start together get different ones."""
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:
        path = parent / f"{number:03d}"
        try:
            reserve(partial, path)
            return path
        except ValueError:
            number += 1


def is_free(path: Path) -> bool:
    """Whether nothing has the name of a new folder, or only an empty folder."""
    return not any(path.iterdir()) if path.is_dir() else not path.exists()


class Links(NamedTuple):
    """What becomes of links in a folder that lead out of it."""

    follow: bool = False
    setting: str = ""  # how to have them followed, for messages

    @property
    def remedy(self) -> str:
        """What to do about one that is not followed."""
        return f"put a copy in its place{f', or {self.setting}' if self.setting else ''}"


REFUSED = Links()
FOLLOW = "set follow_links=true"
OPTION = "give --follow-links"


def inside(folder: Path, name: str | Path, links: Links = REFUSED) -> Path:
    """The path of a file of a folder by the name that somebody else's file, table or archive has for it.

    The name must not lead out of the folder, be it by `..` or as an absolute path; nor must a link. The hub's cache
    counts as inside: files below snapshots/<commit> are links to blobs/ beside it.

    Args:
        folder: A folder that a person named.
        name: A path relative to it, or an absolute one.
        links: What becomes of links that lead out of the folder.

    Raises:
        ValueError: It is somewhere else, or no valid path. The message is to follow the name.
    """
    path = folder / os.path.normpath(name)
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL byte
        raise ValueError("is not a valid path") from None
    blobs = [each.parents[1] / "blobs" for each in (root, *root.parents) if each.parent.name == "snapshots"]
    is_named_inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    if any(map(real.is_relative_to, (root, *blobs))) or (links.follow and is_named_inside):
        return path
    if is_named_inside:
        raise ValueError(f"is a link to {real}, outside of {folder}: {links.remedy}")
    raise ValueError(f"is outside of the folder {folder}: copy it there")


def check_entry(file: Path, folder: Path, links: Links = REFUSED) -> Path:
    """As `inside`, of a file that was found in a folder.

    Raises:
        ValueError: It is a link that leads out. The message names it.
    """
    try:
        return inside(folder, file.relative_to(folder), links)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link, which takes no room; a copy where the file system has none, or is another one."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A context in which there is a folder under a temporary name beside `path`; what is in it at the end is removed.

    Args:
        path: What is written. Missing parents are created.

    Raises:
        OSError: There can be no folder.
    """
    make_folder(path.parent)
    with partial_of(path, is_folder=True) as partial:
        (partial / BEGUN).touch()
        yield partial


@contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A context in which a folder is filled under a temporary name beside `path`, and at whose end it is renamed.

    After an error the temporary folder is removed.

    Args:
        path: The final folder, which must not exist or be empty. Missing parents are created.

    Yields:
        The temporary folder.

    Raises:
        OSError: The folder cannot be written.
        ValueError: It exists by now.
    """
    with partial_folder(path) as partial:
        yield partial
        complete(partial)
        reserve(partial, path)
    flush(path.parent)


@contextmanager
def written_together(folder: Path, last: str) -> Iterator[Path]:
    """A context in which new files of a folder are written; at its end a new folder appears with all of them.

    In a folder that exists they appear one by one, so that after a kill the same command can be repeated.

    Args:
        folder: The folder.
        last: The name of the file that appears last: what is there without it is incomplete.

    Yields:
        The temporary folder to write to.

    Raises:
        OSError: A file cannot be written.
        ValueError: A file exists with other content. None is written then.
    """
    if not folder.exists():  # an empty one keeps its permissions
        with written_at_once(folder) as partial:
            yield partial
        return
    with partial_folder(folder / last) as partial:
        yield partial
        complete(partial)
        files = sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name))
        targets = {file: folder / file.name for file in files}
        for file, target in targets.items():
            if target.exists() and not is_same_file(file, target):
                raise already_there(target)
        for file, target in targets.items():
            reserve(file, target)
    flush(folder)


def complete(partial: Path) -> None:
    """Waits until the files of a folder are on the disk, with the permissions that the umask sets.

    Raises:
        ValueError: The folder was removed meanwhile, so that the first of its files are missing.
    """
    try:
        (partial / BEGUN).unlink()
    except FileNotFoundError:
        raise ValueError(f"{partial.parent} was removed while files were written to it: start again") from None
    permissions = partial.stat().st_mode & 0o666  # safetensors lets only the owner read
    for file in (file for file in partial.rglob("*") if file.is_file()):
        file.chmod(permissions)
        flush(file)

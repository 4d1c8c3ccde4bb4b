"""Numbered folders, as runs have them, and folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_mm.utils.atomic import flush
from dora_mm.utils.partials import partial_of


def claim_number(parent: Path) -> Path:
    """Claims the next number by creating its folder, so that two runs that start together get different numbers.

    Args:
        parent: Holds the numbered folders; it is created if it is missing.

    Returns:
        The new folder, such as `parent`/003.
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link, which takes no room; a copy where the file system has none, or is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A context in which a folder is filled under a temporary name beside `path`, and at whose end it is renamed.

    After an error the temporary folder is removed.

    Args:
        path: The final folder, which must not exist. Missing parents are created.

    Yields:
        The temporary folder.

    Raises:
        OSError: The folder cannot be written, or exists by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        partial.mkdir()
    except OSError as error:  # a message has the name that a person knows
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield partial
        permissions = partial.stat().st_mode & 0o666  # as the umask sets them; safetensors lets only the owner read
        for file in (file for file in partial.rglob("*") if file.is_file()):
            file.chmod(permissions)
            flush(file)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial)
        raise
    flush(path.parent)

"""Atomic file writes: a file appears complete or not at all."""

import errno
import filecmp
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from dora_mm.utils.lock import check_lock, make_folder
from dora_mm.utils.partials import NOFOLLOW, partial_of, remove_dead

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)  # of renames onto what exists


def write_atomically(
    path: Path, write: Callable[[Path], object], *, flushes: bool = True, is_new: bool = False
) -> None:
    """Writes a file under a temporary name in the same folder, flushes it to disk and renames it to `path`.

    Missing parent folders are created. After an error the temporary file is removed and an existing `path` is kept.

    Args:
        path: The final file; it is replaced if it exists with other content, and else stays as it is, with its time.
        write: Called with the temporary path, to which it must write the content.
        flushes: Whether to wait for the disk. Without, a file may be damaged where the power fails.
        is_new: Whether a file with other content is an error; see `reserve`.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
        ValueError: Another process has taken over the folder, of which this one was the only writer; or the file
            exists and has to be new.
    """
    check_lock(path)
    make_folder(path.parent)
    try:
        with partial_of(path) as partial:
            write(partial)
            if flushes:
                flush(partial)
            check_lock(path)
            if is_new:
                reserve(partial, path)
            elif not is_same_file(partial, path):
                os.replace(partial, path)
    except FileNotFoundError:
        check_lock(path)  # who has taken the folder over has removed what was half written in it
        raise
    if flushes:
        flush(path.parent)


def reserve(partial: Path, path: Path) -> None:
    """Gives a file or folder that is complete its name, and replaces nothing, whoever writes at the same time.

    Args:
        partial: The file or folder; of a file a second name may remain.
        path: Its name. A file with the same content is left by a command that was killed, and is no obstacle; nor is an
            empty folder.

    Raises:
        ValueError: Something else has the name.
        OSError: It cannot be had.
    """
    if is_same_file(partial, path):
        return
    try:
        if partial.is_dir():
            partial.rename(path)
        else:
            _link(partial, path)
    except OSError as error:
        if error.errno in _TAKEN:
            raise already_there(path) from None
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that a person knows


def already_there(path: Path, key: str = "") -> ValueError:
    """The error where something else has the name of what is to be written; what dead processes left beside it goes."""
    remove_dead(path.parent)
    return ValueError(f"{key}{' ' if key else ''}{path} exists already: name a new file or folder")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths are files with the same content."""
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _link(partial: Path, path: Path) -> None:
    """Gives a file a second name, which must be new."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; see `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Appends UTF-8 text to a file; a process that is killed meanwhile may leave a part of it.

    Raises:
        OSError: It cannot be written, or is a link to another file.
    """
    check_lock(path)
    with open_to_append(path) as file:
        file.write(text)


def open_to_append(path: Path) -> TextIO:
    """Opens a file of UTF-8 text to append to it; what a link leads to is not written to.

    Raises:
        OSError: It cannot be opened, or is a link.
    """
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | NOFOLLOW, 0o666))


def flush(path: Path) -> None:
    """Waits until the content of a file, or the directory entries of a folder, are on disk (fsync)."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The temporary names of what is being written, and their removal where its writer is dead."""

import functools
import hashlib
import os
import re
import shutil
import socket
from pathlib import Path

PARTIAL = ".partial"  # how temporary names end
HOST = socket.gethostname()


def partial_of(path: Path) -> Path:
    """The temporary name beside `path` to which this process writes it, after those of dead ones beside it are gone."""
    remove_dead(path.parent)
    partial = path.with_name(f".{path.name}.{_host_digest()}-{os.getpid()}{PARTIAL}")
    _remove(partial)  # of a dead process that had the same number, or a link, which would be followed
    return partial


def remove_partials(folder: Path, unless: str) -> None:
    """Removes everything with a temporary name from a folder, in which no other process writes.

    Args:
        folder: The folder, with its subfolders.
        unless: Subfolders that have a file of this name are those of other writers, and stay as they are.
    """
    for parent, folders, files in os.walk(folder):
        if unless in files and Path(parent) != folder:
            folders.clear()
            continue
        for name in [*folders, *files]:
            if name.startswith(".") and name.endswith(PARTIAL):
                _remove(Path(parent, name))


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs."""
    import psutil  # here, since commands that find no dead process need not load it

    return psutil.pid_exists(pid)  # os.kill(pid, 0) would end it on Windows


@functools.cache  # once in a process: a cache may have ten thousand files
def remove_dead(folder: Path) -> None:
    """Removes what processes of this machine have left that run no more."""
    for partial in folder.glob(f".*.{_host_digest()}-*{PARTIAL}"):
        found = re.search(rf"-(\d+){re.escape(PARTIAL)}$", partial.name)
        if found and not is_running(int(found[1])):
            _remove(partial)


def _host_digest() -> str:
    return hashlib.sha256(HOST.encode()).hexdigest()[:8]  # short, and without characters that no file can have


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)

"""Temporary names of what is being written, and the removal of what a dead process has left under them.

A process locks what it writes (`flock`). The lock ends with the process, and all containers of a machine see it,
whatever they call the process. Other machines may not see it (NFS has no locks of folders between them, and some
network file systems have none of files): what another machine has left goes by its age, as all does where there are no
locks. (filelock locks a file beside the one that is written, which stays, and knows no ages.)
"""

import functools
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

PARTIAL = ".partial"  # how temporary names end
# Seconds without a write: not even work on a machine that sleeps over night pauses longer, and what is kept too long
# only takes room on the disk
ABANDONED = 24 * 3600.0
NOFOLLOW, NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)  # Windows has neither
UNLOCKED = "unlocked"  # in the name of a file that goes by its age alone, since SMB lets nobody write to a locked one
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def partial_of(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A context with a new file under a temporary name beside `path`, after those of dead processes there are gone.

    What has the temporary name at the end is removed.

    Args:
        path: The final name; its folder exists.
        is_folder: Whether to make a folder, not a file.

    Yields:
        The file or folder, which is empty and which other processes leave alone.

    Raises:
        OSError: It cannot be made; the error names `path`.
    """
    remove_dead(path.parent)
    partial = None
    try:
        with ExitStack() as locks:  # closed before the name goes: NFS gives an open file another name instead
            while True:
                partial = _new(path, is_folder, machine())
                # `remove_dead` of another process may have locked or removed it in between
                is_locked = locks.enter_context(_lock_of(partial))
                if is_locked is not False and partial.exists():
                    break
            if is_locked and not is_folder and _shuts_out(partial):
                locks.close()
                _remove(partial)
                partial = _new(path, is_folder, UNLOCKED)
            yield partial
    finally:
        if partial is not None:
            _remove(partial)


def remove_partials(folder: Path, unless: str) -> None:
    """Removes what has a temporary name from a folder, to which no other process writes but for its own locked files.

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
                with _lock_of(Path(parent, name)) as is_locked:
                    if is_locked is not False:
                        _remove(Path(parent, name))


@functools.cache  # once in a process: a cache may have ten thousand files
def remove_dead(folder: Path) -> None:
    """Removes what dead processes have left in a folder."""
    for partial in folder.glob(f".*{PARTIAL}"):
        if f".{UNLOCKED}-" in partial.name:
            if _silence(partial) > ABANDONED:
                _remove(partial)
            continue
        is_ours = f".{machine()}-" in partial.name
        with _lock_of(partial) as is_locked:
            if (is_locked and is_ours) or (is_locked is not False and _silence(partial) > ABANDONED):
                _remove(partial)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder, until it is closed or the process ends.

    Returns:
        Whether it is locked now; False: another process has locked it; None: the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (EAGAIN, EACCES) else None
    return True


@functools.cache
def machine() -> str:
    """A short name of the running system, whose processes see each other's locks; another one after each reboot.

    Host names would not do: the containers of a machine may have several, and two machines the same.
    """
    try:
        name = _BOOT.read_text(encoding="utf-8").strip()
    except OSError:  # not on Linux
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def time_on(folder: Path) -> float:
    """The time by the clock of a folder's file system: the clocks of machines differ.

    Raises:
        OSError: Nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _new(path: Path, is_folder: bool, owner: str) -> Path:
    while True:
        partial = path.with_name(f".{path.name}.{owner}-{secrets.token_hex(4)}{PARTIAL}")
        try:
            if is_folder:
                partial.mkdir()
            else:
                partial.touch(exist_ok=False)  # which follows no link
            return partial
        except FileExistsError:
            continue
        except OSError as error:  # a message has the name that a person knows
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _lock_of(partial: Path) -> Iterator[bool | None]:
    """A context in which a file or folder is locked, if it can be; see `try_lock`."""
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):  # a link, or another person's
            # NFS locks only files that may be written to; folders cannot be opened so
            descriptor = os.open(partial, (os.O_RDONLY if partial.is_dir() else os.O_RDWR) | NOFOLLOW | NONBLOCK)
    try:
        yield None if descriptor is None else try_lock(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _shuts_out(partial: Path) -> bool:
    """Whether the lock of a file keeps its own process from writing to it by another descriptor, as on SMB."""
    try:
        with partial.open("r+b", buffering=0) as other:
            other.write(b"\0")
            other.truncate(0)
    except PermissionError:
        return True
    return False


def _silence(partial: Path) -> float:
    """Seconds since the last write to a file, or to one of those in a folder; 0 where that cannot be known."""
    try:
        inside = [] if partial.is_symlink() else list(partial.rglob("*"))
        return time_on(partial.parent) - max(path.lstat().st_mtime for path in (partial, *inside))
    except OSError:
        return 0.0


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):  # another process has removed it, or alone may do so
            partial.unlink()

"""One writer per folder: a lock of the operating system, which ends with its process, and a sign of life.

The lock (`flock`) counts on its machine, and on others where the file system has locks for all of them. For machines
that do not see it there is the file: it names the writer, which touches it every 10 s. The number of its process is for
people: in another container it means another process, or none. (filelock has no sign of life: without locks of the file
system two machines would write to one folder.)
"""

import json
import logging
import os
import socket
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from errno import ELOOP
from pathlib import Path
from typing import NamedTuple

from dora_mm.utils.json_text import read_json
from dora_mm.utils.partials import NOFOLLOW, NONBLOCK, fcntl, machine, remove_partials, time_on, try_lock

log = logging.getLogger(__name__)
LOCK = ".lock"  # the name of the file
HEARTBEAT = 10.0  # seconds from one sign of life to the next
SILENCE = 60.0  # seconds without one, after which a writer counts as dead whose lock is not seen
HOST = socket.gethostname()

_locks: dict[Path, "FolderLock"] = {}  # the locks of this process, by their folders


class Writer(NamedTuple):
    """The writer of a folder, as its lock file names it."""

    host: str
    process: int
    since: str
    token: str  # no other writer's
    machine: str = ""  # where its lock is seen; earlier releases did not name it

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since})"


class FolderLock:
    """The lock of a folder, which this process holds.

    Args:
        folder: The folder.

    Raises:
        ValueError: Another process writes to the folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        since = datetime.now().isoformat(sep=" ", timespec="seconds")
        self.writer = Writer(HOST, os.getpid(), since, uuid.uuid4().hex, machine())
        self._descriptor, is_locked = self._opened()
        try:
            self._check_free(is_locked)
        except BaseException:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, json.dumps(self.writer._asdict()).encode())
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Checks that the lock is still that of this process.

        Raises:
            ValueError: Another process has taken it over.
        """
        found = self._read()
        if found is None or found.token != self.writer.token:
            who = f"{found} has taken it over" if found else f"its {LOCK} is gone"
            raise ValueError(
                f"{self.folder}: {who}, since this process gave no sign of life for {SILENCE:.0f} s. It stops here, "
                "and writes nothing more."
            )

    def release(self) -> None:
        """Ends the lock, so that the next process can take it at once."""
        self._released.set()
        with suppress(ValueError, OSError):
            self.check()
            if fcntl is None:
                os.close(self._descriptor)  # Windows removes no file that is open
            self.path.unlink()
        if fcntl is not None:
            os.close(self._descriptor)

    def _opened(self) -> tuple[int, bool | None]:
        """A descriptor of the file; and whether that is locked now, None where the file system has no locks."""
        while True:
            descriptor = self._own_file()
            is_locked = try_lock(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    return descriptor, is_locked
            os.close(descriptor)  # its owner has removed it in between

    def _own_file(self) -> int:
        """A descriptor of the file, which is made where it is missing: what a link leads to is not written to."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | NOFOLLOW | NONBLOCK, 0o666)
        except OSError as error:
            if error.errno != ELOOP:
                raise
        else:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:  # 0: its owner has just removed it
                return descriptor
            os.close(descriptor)
        raise ValueError(f"{self.path} is a link to another file, or none of ours: remove it")

    def _check_free(self, is_locked: bool | None) -> None:
        found = self._read()
        if is_locked and (found is None or found.machine == self.writer.machine):
            return  # the lock of a process ends with it
        silence = max(0.0, time_on(self.folder) - self.path.stat().st_mtime)
        if is_locked is False or (found is not None and silence < SILENCE):
            later = "" if is_locked is False else f" After {SILENCE:.0f} s without one it counts as dead."
            raise ValueError(
                f"{self.folder} has a writer already, {found or 'a process'}, whose last sign of life was "
                f"{silence:.0f} s ago: wait for its end, or end it first.{later}"
            )
        if found:
            log.warning("Taking over %s: %s has been silent for %.0f s.", self.folder, found, silence)

    def _read(self) -> Writer | None:
        """The writer; None where the file does not name one."""
        try:
            return Writer(**read_json(self.path))
        except (ValueError, TypeError):
            return None

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                self.check()
                os.utime(self.path)
            except ValueError:
                return
            except OSError:  # a network file system that is away for a moment
                continue


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A context in which this process is the only one that writes to a folder; what dead ones have left goes first.

    Raises:
        ValueError: Another process writes to it; the message says who.
    """
    path = folder.resolve()
    lock = FolderLock(folder)
    _locks[path] = lock
    try:
        remove_partials(folder, unless=LOCK)
        yield
    finally:
        del _locks[path]
        lock.release()


def check_lock(path: Path) -> None:
    """Checks before a write, where this process is the only writer of a folder around `path`, that it still is.

    Raises:
        ValueError: Another process has taken the folder over.
    """
    if _locks:
        parent = path.parent.resolve()  # a page is written where the run really is
        for folder, lock in list(_locks.items()):
            if parent.is_relative_to(folder):
                lock.check()


def make_folder(folder: Path) -> None:
    """Makes a folder with its parents; but not anew one of which this process is the only writer, which was removed.

    Raises:
        ValueError: Such a folder was removed, or another process has taken it over.
        OSError: The folder cannot be made.
    """
    path = folder.resolve()
    lock = [each for each in _locks if path.is_relative_to(each)]
    if not lock:
        folder.mkdir(parents=True, exist_ok=True)
        return
    top = max(lock, key=lambda each: len(each.parts))
    try:
        for level in reversed([path, *path.parents]):
            if top in level.parents and not level.is_dir():
                level.mkdir(exist_ok=True)
    except FileNotFoundError:
        check_lock(path)
        raise

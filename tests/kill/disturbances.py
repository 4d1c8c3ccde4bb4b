"""What happens to a command at a file event: before something is opened to write to it, renamed, linked or removed."""

import errno
import mmap
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

MAKING = ("os.rename", "os.link", "os.mkdir")
EVENTS = (*MAKING, "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
KILLED = -signal.SIGKILL
CLOCK = "FAKETIME_TIMESTAMP_FILE"  # of libfaketime: names a file with the seconds by which the clock is wrong
HOUR = 3600


class Command(NamedTuple):
    """What a disturbance has to know of the command: what to run, and the file that it reads."""

    run: Callable[[], object]
    reads: str


class Disturbance(NamedTuple):
    """What happens at one event.

    Attributes:
        act: Does it, in the process of the command.
        codes: How the command may end.
        errors: An error of the system that each later event has, too.
        stays: Whether what it changed is another input, so that there are two right results.
        by_clock: Whether it sets the clock, for which the process has to be under libfaketime.
    """

    act: Callable[[Command], object]
    codes: tuple[int, ...]
    errors: int = 0
    stays: bool = False
    by_clock: bool = False


def _signal(number: int) -> Callable[[Command], object]:
    return lambda command: os.kill(os.getpid(), number)


def _small_files(command: Command) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))


def _vanish(command: Command) -> None:
    for folder in (Path("out"), Path("here")):
        if folder.is_dir():
            shutil.rmtree(folder)


def _second(command: Command) -> None:
    """The same command, from its beginning to its end."""
    if not (child := os.fork()):
        try:
            command.run()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _long_stop(command: Command, meanwhile: Callable[[Command], object] = lambda command: None) -> None:
    """Stops this process for an hour by the clock, which another one sets before it lets this one go on."""
    process = os.getpid()
    if not (child := os.fork()):
        try:
            while _state(process) != "T":
                time.sleep(0.001)
            an_hour_later()
            meanwhile(command)
        finally:
            os.kill(process, signal.SIGCONT)
            os._exit(0)
    os.kill(process, signal.SIGSTOP)
    os.waitpid(child, 0)


def _state(process: int) -> str:
    """The state of a process: R, S, T."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]


def an_hour_later() -> None:
    """Sets the clock of all processes under libfaketime, and ages the locks, whose times are of the file system."""
    clock = Path(os.environ[CLOCK])
    new = clock.with_name(f"{clock.name}.new")
    new.write_text(f"+{int(clock.read_text()) + HOUR}")
    new.replace(clock)  # libfaketime reads it at each look at the clock
    for lock in Path().rglob(".lock"):
        before = lock.stat().st_mtime - HOUR
        os.utime(lock, (before, before))


def other_input(command: Command) -> None:
    """Another content in the place of a file that the command reads, as an editor writes it: by a rename."""
    path = Path(command.reads)
    new = path.with_name("new" + path.suffix)
    if path.suffix == ".png":
        Image.new("RGB", (64, 64), (10, 200, 30)).save(new)
    elif path.suffix == ".json":
        new.write_bytes(path.read_bytes() + b" \n")
    else:
        content = bytearray(path.read_bytes())
        content[-2] ^= 8  # of the last value
        new.write_bytes(content)
    os.utime(new, (1e9, 1e9))  # names of thumbnails depend on it
    new.rename(path)


DISTURBANCES: dict[str, Disturbance] = {
    "SIGKILL": Disturbance(_signal(signal.SIGKILL), (KILLED,)),
    "SIGTERM": Disturbance(_signal(signal.SIGTERM), (0, 143, -signal.SIGTERM)),
    "SIGHUP": Disturbance(_signal(signal.SIGHUP), (0, 129, -signal.SIGHUP)),
    "SIGINT": Disturbance(_signal(signal.SIGINT), (0, 130)),
    "a full disk": Disturbance(lambda command: None, (0, 2), errno.ENOSPC),
    "a disk that is read-only": Disturbance(lambda command: None, (0, 2), errno.EROFS),
    "files that are too large": Disturbance(_small_files, (0, 2)),
    "a folder that vanishes": Disturbance(_vanish, (0, 2)),
    "a second writer": Disturbance(_second, (0, 2)),
    "a long stop": Disturbance(_long_stop, (0,), by_clock=True),
    "a second writer in a long stop": Disturbance(lambda command: _long_stop(command, _second), (0, 2), by_clock=True),
    "another input": Disturbance(other_input, (0, 2), stays=True),
}


def disturb(folder: Path, what: Disturbance, command: Command, number: int, events: memoryview) -> Callable:
    """An audit hook that disturbs at the event of this number, from 0, that changes something in a folder.

    Args:
        folder: The folder.
        what: What happens.
        command: The command.
        number: The number of the event.
        events: Counts them, also those of processes that the command forks.
    """
    place, acting = str(folder.resolve()), False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal acting
        if acting or not (writes := _writes(event, arguments)) or not _path(arguments[0]).startswith(place):
            return
        count, events[0] = events[0], events[0] + 1
        if count == number:
            acting = True
            what.act(command)
            acting = False
        if what.errors and count >= number and (writes == "makes" or what.errors == errno.EROFS):
            raise OSError(what.errors, os.strerror(what.errors), _path(arguments[0]))

    return hook


def mapped(file: Path) -> memoryview:
    """A number in a file, which several processes count up."""
    with file.open("r+b") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 4)).cast("i")


def counting(folder: Path, events: memoryview) -> Callable:
    """An audit hook that counts the events that change something in a folder."""
    place = str(folder.resolve())

    def hook(event: str, arguments: tuple) -> None:
        if _writes(event, arguments) and _path(arguments[0]).startswith(place):
            events[0] += 1

    return hook


def _writes(event: str, arguments: tuple) -> str:
    """What an event does to a file: "makes", "changes" or "" for nothing."""
    if event == "open" and not isinstance(arguments[0], int):
        return "makes" if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR) else ""
    return ("makes" if event in MAKING else "changes") if event in EVENTS else ""


def _path(name: str | bytes | os.PathLike | int) -> str:
    return os.readlink(f"/proc/self/fd/{name}") if isinstance(name, int) else os.path.abspath(os.fsdecode(name))

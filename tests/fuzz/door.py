"""A door: files of one kind, and what reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutations import Change


@dataclass(frozen=True)
class Door:
    """One of the files of a folder, which is changed, and what reads it.

    Attributes:
        name: Of the door.
        make: Fills a folder.
        files: The files of which one is changed, relative to the folder.
        read: Reads them.
        changes: Changes of its own, beside those that the end of a file's name tells.
    """

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    changes: tuple[Change, ...] = ()

"""Streaming readers for large JSON files, which yield one item at a time with its place in the file.

The official VQA v2 annotations (440,000 questions, 350 MB) take 2.2 s and 12 MB this way; json.load takes 3 GB.
"""

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from dora_mm.utils import json_stream
from dora_mm.utils.json_stream import JSONStream
from dora_mm.utils.json_text import check_no_device

Item = tuple[str, Any]  # (place in the file, such as "line 3"; the value)
MOST_UNPACKED = 100  # times the size of a gzip file: conversations take some 3 to 20 times
LEAST_UNPACKED = 64 * 2**20  # bytes that any may unpack to
ID_KEYS = ("question_id", "qid", "identifier", "clip_id", "vid_name", "cocoid", "id")


def list_items(path: Path, member: str | None = None) -> Iterator[Item]:
    """The items of the list at the top level of a JSON file, or of the list `member` of its top-level object.

    Args:
        path: The JSON file.
        member: The key of the list, None if the file itself is a list.

    Returns:
        An iterator over ("item 1", value), ("item 2", value), ...

    Raises:
        ValueError: While iterating: the file cannot be read, is not valid JSON, is truncated (the message names the
            last complete item) or has no such items.
    """
    expected = "a list" if member is None else f"an object with a list {member!r}"

    def parse(file: BinaryIO) -> Iterator[Item]:
        stream = JSONStream(file)
        lists = [stream.elements()] if member is None else _lists(stream, member)
        for number, value in enumerate(chain.from_iterable(lists), 1):
            yield f"item {number}", value
        stream.end()

    return _guarded(path, expected, parse)


def _lists(stream: JSONStream, member: str) -> Iterator[Iterator[Any]]:
    """The lists of that name in an object: one, or each where a key is there twice."""
    for key in stream.members():
        if key == member:
            yield stream.elements()
        else:
            stream.skip()


def numbered(items: Iterable[Item], key: str) -> Iterator[Item]:
    """The items with their numbers, from 0, under this key where they do not have it themselves."""
    for number, (where, item) in enumerate(items):
        yield where, {key: number} | item if isinstance(item, dict) else item


def object_items(path: Path) -> Iterator[Item]:
    """The members of the top-level object of a JSON file. A duplicate key is yielded each time it occurs.

    Returns:
        An iterator over ("id 'KEY'", {"id": key, "value": value}).

    Raises:
        ValueError: As in `list_items`.
    """

    def parse(file: BinaryIO) -> Iterator[Item]:
        stream = JSONStream(file)
        for key in stream.members():
            yield f"id {key!r}", {"id": key, "value": stream.value()}
        stream.end()

    return _guarded(path, "an object", parse)


def json_lines(path: Path) -> Iterator[Item]:
    """The non-blank lines of a JSONL file, as bytes that are not parsed yet.

    Returns:
        An iterator over ("line 1", line), ...; the numbers count blank lines too.

    Raises:
        ValueError: While iterating: the file cannot be read or has no lines.
    """

    def parse(file: BinaryIO) -> Iterator[Item]:
        lines = (line.removeprefix(BOM_UTF8) for line in _lines(file))  # those that begin with one may have been joined
        return ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())

    return _guarded(path, "one JSON object per line", parse)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    most = json_stream.MOST_CHARACTERS
    while line := file.readline(most + 1):
        if len(line) > most:
            raise json.JSONDecodeError(f"a line has more than {most:,} bytes", "", 0)
        yield line


def value_of(path: Path, key: str) -> Any:
    """The member `key` of the top-level object of a JSON file, None if there is none. Reading stops after that member.

    Raises:
        ValueError: The file cannot be read, is not valid JSON or is truncated.
    """

    def parse(file: BinaryIO) -> Iterator[Item]:
        stream = JSONStream(file)
        for found in stream.members():
            if found == key:
                yield key, stream.value()
            else:
                stream.skip()

    return next(_guarded(path, "an object", parse, empty=True), ("", None))[1]


def open_data(path: Path) -> BinaryIO:
    """Opens a file for reading, which is decompressed where its first bytes are gzip's.

    Raises:
        OSError: It cannot be read.
        ValueError: It is a pipe or a device.
    """
    check_no_device(path)
    file = path.open("rb")
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path, file), 2**20)) if packed else file


class _Unpacked(io.RawIOBase):
    """The unpacked content of a gzip file, up to `MOST_UNPACKED` times its size: zeros take a thousandth."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file, self._unpacked = path, file, gzip.GzipFile(fileobj=file)
        self._most = max(LEAST_UNPACKED, MOST_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._unpacked.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        size = self._unpacked.readinto(buffer)
        if self._unpacked.tell() > self._most:
            raise ValueError(f"{self._path} holds more than {self._most:,} bytes, {MOST_UNPACKED} times its own size")
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def check_encoding(path: Path, start: bytes) -> None:
    """Refuses a file whose first bytes are UTF-16's, which PowerShell's `>` writes.

    Raises:
        ValueError: They are.
    """
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16: save it as UTF-8")


def location(path: Path, where: str, item: Any = None) -> str:
    """The description of a row in messages, such as "questions.json, item 3 (question_id 17)"."""
    known = [f"{key} {item[key]!r}" for key in ID_KEYS if isinstance(item, dict) and key in item]
    return f"{path}, {where}" + (f" ({known[0]})" if known and known[0] != where else "")


def _guarded(
    path: Path, expected: str, parse: Callable[[BinaryIO], Iterator[Item]], *, empty: bool = False
) -> Iterator[Item]:
    """The items that `parse` yields; errors become one sentence that names the last complete item."""
    last = None
    try:
        with open_data(path) as file:
            if (start := file.read(len(BOM_UTF8))) != BOM_UTF8:  # Windows' programs write it, and JSON has none
                file.seek(0)
            check_encoding(path, start)
            for last in parse(file):
                yield last
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path} is truncated or not a valid gzip file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = "" if last is None else location(path, *last).removeprefix(f"{path}, ")
        after = f" after {where}, the last complete item" if where else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
        raise ValueError(f"{path} is truncated or not valid JSON{after} ({reason})") from None
    if last is None and not empty:
        raise ValueError(f"{path} has no rows: it must contain {expected} that is not empty")

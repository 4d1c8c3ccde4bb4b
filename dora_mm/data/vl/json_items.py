"""JSON that is too large to hold: its items one by one, as (place, value), and where it breaks off.

The official VQA v2 annotations (440,000 questions, 350 MB) take 2.2 s and 12 MB this way; json.load takes 3 GB.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

__all__ = ["Item", "json_lines", "list_items", "object_items", "place", "value_of"]

Item = tuple[str, Any]  # where it stands in its file, such as "line 3", and what stands there
ID_KEYS = ("question_id", "qid", "identifier", "clip_id", "vid_name", "cocoid", "id")


def list_items(path: Path, member: str | None = None) -> Iterator[Item]:
    """The items of the list that the file is, or that the file's object has as `member`.

    Raises:
        ValueError: the file cannot be read, is no JSON, is cut off (names the last whole item) or has no such items.
    """
    prefix = "item" if member is None else f"{member}.item"
    expected = "a list" if member is None else f"an object with a list {member!r}"

    def parse(file: BinaryIO) -> Iterator[Item]:
        for number, value in enumerate(ijson.items(file, prefix, use_float=True), 1):
            yield f"item {number}", value

    return _guarded(path, expected, parse)


def object_items(path: Path) -> Iterator[Item]:
    """{"id": key, "value": value} of the object that the file is. A key that stands there twice comes twice.

    Raises:
        ValueError: as `list_items`.
    """

    def parse(file: BinaryIO) -> Iterator[Item]:
        for key, value in ijson.kvitems(file, "", use_float=True):
            yield f"id {key!r}", {"id": key, "value": value}

    return _guarded(path, "an object", parse)


def json_lines(path: Path) -> Iterator[Item]:
    """The lines of a JSONL file as bytes, not parsed, without the blank ones.

    Raises:
        ValueError: the file cannot be read or holds no lines.
    """

    def parse(file: BinaryIO) -> Iterator[Item]:
        return ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())

    return _guarded(path, "one JSON object a line", parse)


def value_of(path: Path, key: str) -> Any:
    """What the file's object has as `key`, None without it. Reads no further than that.

    Raises:
        ValueError: the file cannot be read, is no JSON or is cut off.
    """
    found = _guarded(path, "an object", lambda file: ((key, value) for value in ijson.items(file, key)), empty=True)
    return next(found, ("", None))[1]


def place(path: Path, where: str, item: Any = None) -> str:
    """Names a row for people: "questions.json, item 3 (question_id 17)"."""
    known = [f"{key} {item[key]!r}" for key in ID_KEYS if isinstance(item, dict) and key in item]
    return f"{path}, {where}" + (f" ({known[0]})" if known and known[0] != where else "")


def _guarded(
    path: Path, expected: str, parse: Callable[[BinaryIO], Iterator[Item]], *, empty: bool = False
) -> Iterator[Item]:
    """What `parse` yields; what goes wrong becomes one sentence that names the last whole item."""
    last = None
    try:
        with path.open("rb") as file:
            for last in parse(file):
                yield last
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        known = "" if last is None else f", after {place(path, *last).removeprefix(f'{path}, ')}, the last whole one"
        raise ValueError(f"{path} is cut off or no JSON{known} ({_reason(error)})") from None
    if last is None and not empty:
        raise ValueError(f"{path} holds no rows: {expected} is expected, with something in it")


def _reason(error: Exception) -> str:
    """The first line of the parser's message; a drawing of the place follows it."""
    message = error.args[0] if isinstance(error.args[0], bytes) else str(error).encode()
    return message.decode(errors="replace").split("\n")[0]

"""JSON that anybody may have written, of bounded size and depth."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_mm.utils.messages import shown

MAX_BYTES = 16 * 2**20  # the header of a model of 100,000 tensors has 15 MB


def parse_json(text: str | bytes, what: str, kind: type[Any] = dict) -> Any:
    """Parses a JSON object or list.

    Args:
        text: The text, in UTF-8.
        what: What it is, for messages.
        kind: The type that the value must have; `object`: any.

    Raises:
        ValueError: It is not valid JSON, is nested too deeply, or has another type.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique_members)
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{what} is not a JSON {'object' if kind is dict else 'list'}")
    return value


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its members; raises ValueError where two have one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"it has {shown(max(counts, key=counts.__getitem__))} twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        ValueError: It cannot be read, is too large, or holds something else.
    """
    return parse_json(read_bounded(path), str(path))


def read_bounded(path: Path, most: int = MAX_BYTES) -> bytes:
    """Reads a file of at most so many bytes.

    Raises:
        ValueError: It cannot be read, or is larger.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"{path} has {size} bytes, and at most {most} are read")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file")
        check_no_device(path)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_no_device(path: Path, key: str = "") -> None:
    """Checks that a path is no named pipe, which would wait for ever, nor a device, which may have no end.

    Args:
        path: The path, which need not exist.
        key: What named it, for the message.

    Raises:
        ValueError: It is.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{key}{': ' if key else ''}{path} is a pipe or a device, not a file")


def finite(value: Any) -> Any:
    """A value of JSON types without NaN and infinity, which JSON does not have: they become None."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

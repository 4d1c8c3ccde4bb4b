"""The header of a safetensors file, which anybody may have written, parsed one member at a time.

So memory holds its text and what it says about each tensor, whatever else a text of that length may hold: the json
module builds all of it, and keeps the last of two members of one name. The safetensors library does so, too, and takes
names that no module has: of any length, and with characters that a terminal obeys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch

from dora_mm.utils.json_text import unique_members
from dora_mm.utils.messages import UNSEEN, shown
from dora_mm.utils.tensor_writer import DTYPES, METADATA, header_bytes

LONGEST_NAME = 1000  # characters
_LONGEST_ENTRY = 1000  # characters of what is said about a tensor
_MAX_DIMENSIONS = 8
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, of_torch) for name, of_torch in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BEGIN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}[ \t\n\r]*)?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_read_value = json.JSONDecoder(object_pairs_hook=unique_members).raw_decode
T = TypeVar("T")


class TensorEntry(NamedTuple):
    """The entry of a tensor in a header: its dtype, its shape, and its offset from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in headers."""
        return _NAMES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """The length of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The part of the tensor that is its rows from `start` to `stop`."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return TensorEntry(self.dtype, (stop - start, *self.shape[1:]), self.offset + start * row)


class DamagedError(Exception):
    """A safetensors file is damaged; the message is the problem, without the path."""


def parse_header(header: bytes, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors by name, in the order of the file, and the texts of the metadata.

    Args:
        header: The header, without the 8 bytes of its length.
        size: The length of the file in bytes.

    Raises:
        DamagedError: It is not valid, or does not describe a file of this length.
    """
    start = 8 + len(header)

    def value(text: str, position: int, key: str) -> tuple[Any, int]:
        is_metadata = key == METADATA and text[position : position + 1] == "{"
        return _members(text, position, _text) if is_metadata else _entry(text, position, key, start)

    try:
        text = header.decode()
        del header
        found, end = _members(text, 0, value)
        metadata = found.pop(METADATA, {})
        "".join([*metadata, *metadata.values()]).encode()  # half a surrogate pair, which no other reader takes
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its header is not valid JSON: {error}") from error
    if end != len(text):
        raise DamagedError("its header is not valid JSON: something follows it")
    return _in_order(found, start, size), metadata


def write_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file whose tensors lie one behind the other, in the order of the entries."""
    rows = ((key, (entry.dtype_name, entry.shape, entry.num_bytes)) for key, entry in entries.items())
    return header_bytes(rows, metadata)


def _in_order(found: dict[str, TensorEntry], start: int, size: int) -> dict[str, TensorEntry]:
    """The tensors in the order of the file, if they fill it without gaps."""
    if broken := _first_gap(found, start, size):
        found = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
        broken = _first_gap(found, start, size)
    if broken:
        raise DamagedError(broken)
    return found


def _first_gap(entries: dict[str, TensorEntry], start: int, size: int) -> str:
    """The first gap or overlap of tensors in this order, as a message; empty where each begins where the last ends."""
    offset = start
    for key, entry in entries.items():
        if entry.offset != offset:
            return f"the place of {shown(key)} in it does not fit its shape"
        offset += entry.num_bytes
    return "" if offset == size else f"it has {size} bytes, and its header describes {offset}"


def _members(text: str, position: int, value: Callable[[str, int, str], tuple[T, int]]) -> tuple[dict[str, T], int]:
    """The JSON object at a position, and where it ends; `value` parses a value at its position, by its key."""
    if not (begin := _BEGIN.match(text, position)):
        raise DamagedError("its header is not a JSON object")
    found: dict[str, T] = {}
    position, ended = begin.end(), bool(begin[1])
    while not ended:
        key, position = _text(text, position)
        if key in found:
            raise DamagedError(f"its header has {shown(key)} twice")
        position = _end_of(_COLON, text, position).end()
        found[key], position = value(text, position, key)
        after = _end_of(_NEXT, text, position)
        position, ended = after.end(), after[1] == "}"
    return found, position


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    if not (found := pattern.match(text, position)):
        raise DamagedError(f"its header is not valid JSON at character {position}")
    return found


def _text(text: str, position: int, key: str = "") -> tuple[str, int]:
    if text[position : position + 1] != '"':
        raise DamagedError(
            "the metadata of its header is not a table of texts" if key else "its header is not valid JSON"
        )
    return _read_value(text, position)


def _entry(text: str, position: int, key: str, start: int) -> tuple[TensorEntry, int]:
    """The entry of a tensor and the position of its end; `start` is the offset of the first byte after the header."""
    if len(key) > LONGEST_NAME or (not key.isprintable() and UNSEEN.search(key)):
        raise DamagedError(f"no module has the name of its tensor {shown(key)}")
    end = text.find("}", position, position + _LONGEST_ENTRY) + 1
    fields = _read_value(text[position:end])[0] if end and text[position : position + 1] == "{" else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise DamagedError(f"the header does not describe {shown(key)}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamagedError(f"{shown(key)} has the unknown dtype {shown(dtype, 20)}")
    entry = TensorEntry(_DTYPES[dtype], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.num_bytes:
        raise DamagedError(f"the place of {shown(key)} in it does not fit its shape")
    return entry, end


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and not [item for item in value if type(item) is not int or not 0 <= item < 2**63]

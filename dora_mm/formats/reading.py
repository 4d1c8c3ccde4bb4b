"""Opens safetensors files and JSON that anybody may have written: of bounded size, and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from dora_mm.formats.tensor_file import MAX_HEADER, PICKLES

_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how files of torch.save begin
MOST_DIMENSIONS = 8
SAVE_AGAIN = "save it as safetensors in the tool that made it"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A context with an open safetensors file of an adapter, whose tensors are read when their values are used.

    Args:
        path: The file.

    Raises:
        ValueError: It is a pickle, or is not a complete safetensors file with a header of normal size.
    """
    try:
        check_start(path)
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if len(file.get_slice(key).get_shape()) > MOST_DIMENSIONS:
                    raise ValueError(f"{path} is damaged: its {key} has more than {MOST_DIMENSIONS} dimensions")
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def check_start(path: Path) -> None:
    """Checks the first bytes of a safetensors file, which are the size of its header.

    Raises:
        ValueError: The file is a pickle, or its header would be too large.
    """
    with path.open("rb") as file:
        start = file.read(8)
    size = int.from_bytes(start, "little")
    if size <= MAX_HEADER:
        return
    if start.startswith(_PICKLED) or path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run any code when it is opened: {SAVE_AGAIN}")
    raise ValueError(f"{path} cannot be read as a safetensors file: its header would have {size} bytes")


def parse_json(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: It is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

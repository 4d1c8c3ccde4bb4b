"""The state of a training in one safetensors file: its tensors, and all else as typed JSON.

JSON has no tuples, no keys but texts, and no infinity. What it lacks is an object with one member, its type:

    {"tensor": name}    {"tuple": [...]}    {"dict": [[key, value], ...]}    {"float": "inf"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.tensor_writer import writable, write_tensor_file

TREE = "typed_json"  # the tensor that holds the text, in UTF-8: headers are of bounded length


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes states by name.

    Raises:
        ValueError: A value is of a type that the file does not hold.
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({name: encoded(value, name, tensors) for name, value in state.items()}).encode()
    tensors[TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_tensor_file(path, tensors, {})


def read_state(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Reads the states of `write_state`, all or some of them.

    Raises:
        ValueError: The file is damaged, or lacks a name.
    """
    file = TensorFile(path)
    try:
        tree = parse_json(file.read(TREE).numpy().tobytes(), f"the state in {path}")
        return {name: _decoded(tree[name], file.read) for name in (tree if names is None else names)}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error


def encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON value of a state, which may be nested.

    Args:
        value: The state.
        name: Its name, for its tensors and for messages.
        tensors: Gets the tensors by name.

    Raises:
        ValueError: A value is of a type that the file does not hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [encoded(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [encoded(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = ((encoded(key, name, tensors), encoded(each, f"{name}.{key}", tensors)) for key, each in value.items())
        return {"dict": [list(pair) for pair in pairs]}
    if type(value) in (Tensor, nn.Parameter) and writable(value):
        unique = name
        while unique in tensors or unique == TREE:  # 1 and "1" are two keys
            unique += "_"
        tensors[unique] = value
        return {"tensor": unique}
    kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} is a {kind}, which a checkpoint cannot hold")


def _decoded(value: Any, read: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, read) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise KeyError(", ".join(value))
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return read(inner)
    if kind == "float":
        return float(inner)
    if kind == "tuple":
        return tuple(_decoded(each, read) for each in inner)
    if kind == "dict":
        return {_decoded(key, read): _decoded(each, read) for key, each in inner}
    raise KeyError(kind)

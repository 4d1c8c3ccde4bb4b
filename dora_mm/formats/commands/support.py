"""Which tools compute from a file what it means, by its header alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.commands.verify import BOUND, is_read, relative_error
from dora_mm.formats.registry import OTHER_TOOLS
from dora_mm.formats.tools import TOOLS
from dora_mm.formats.tools.comfy import other_half
from dora_mm.formats.tools.tool import Tool

_ROWS, _COLUMNS, _RANK = 6, 5, 2  # of the weights on which formulas are compared


def works_in(file: AdapterFile, scalings: Mapping[str, float]) -> tuple[str, ...]:
    """The tools that compute from a file what it means, at strength 1: their formulas on small random weights.

    Args:
        file: The file, of which no tensor is read.
        scalings: Alpha / rank by module, of those with a rank.

    Returns:
        Keys of `OTHER_TOOLS`; none where it is half of a pair, or a module is incomplete or of an unclear axis.
    """
    if other_half(file.header):
        return ()
    loaders = {
        name: TOOLS[name] for name in OTHER_TOOLS if not TOOLS[name].refuses(file.modules, file.unnamed, file.header)
    }
    known: dict[_Kind, frozenset[str]] = {}
    for module in file.modules:
        readers = tuple(name for name, tool in loaders.items() if tool.names.match(module))
        kind = _kind(file, module, scalings.get(module, 1.0), readers)
        if kind not in known:
            known[kind] = frozenset(_right(file, module, kind))
        loaders = {name: tool for name, tool in loaders.items() if name in known[kind]}
        if not loaders:
            break
    return tuple(loaders)


class _Kind(NamedTuple):
    """What of a module decides whether a tool computes it: the ends of its keys with the sizes, and so on."""

    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    scaling: float
    lost: bool
    readers: tuple[str, ...]


def _kind(file: AdapterFile, module: str, scaling: float, readers: tuple[str, ...]) -> _Kind:
    endings = file.modules[module]
    roles = TOOLS[file.tool].parts
    A, B = (next((file.shape(k) for e, k in endings.items() if roles.get(e) == role), ()) for role in "AB")
    square = bool(len(A) > 1 and B and A[1] == B[0])
    columns = _ROWS if square else _COLUMNS
    sizes = tuple(
        (ending, _small(roles.get(ending, ""), file.shape(key), file.axis(module), columns))
        for ending, key in endings.items()
    )
    lost = any(
        tool.loses and tool.loses.fullmatch(f"{module}.{ending}") for tool in TOOLS.values() for ending in endings
    )
    return _Kind(sizes, scaling, lost, readers)


def _small(role: str, shape: tuple[int, ...], axis: str, columns: int) -> tuple[int, ...]:
    """A small shape of the same form."""
    kernel = tuple(min(size, 3) for size in shape[2:])
    if role == "m":
        long = columns if axis == "in" else _ROWS
        return tuple(long if size > 1 else 1 for size in shape)
    found = {"A": (_RANK, columns), "B": (_ROWS, _RANK), "mid": (_RANK, _RANK)}.get(role, (_ROWS, columns))
    return () if role == "alpha" else (*found, *kernel)[: max(len(shape), 1)]


def _right(file: AdapterFile, module: str, kind: _Kind) -> Iterable[str]:
    generator = torch.Generator().manual_seed(0)
    tensors = {ending: torch.randn(size, generator=generator).abs() + 0.1 for ending, size in kind.sizes}
    A = [size for ending, size in kind.sizes if TOOLS[file.tool].parts.get(ending) == "A"]
    mid = [size for ending, size in kind.sizes if TOOLS[file.tool].parts.get(ending) == "mid"]
    own = TOOLS[file.tool]
    try:
        shape = (_ROWS, A[0][1], *(mid or A)[0][2:]) if A else max(tensors.values(), key=Tensor.numel).shape
        W0 = torch.randn(shape, generator=generator)
        W = new_weight(own.read(_parts(own, file, module, tensors, kind.scaling), None), W0)
    except (ValueError, RuntimeError, IndexError):  # damaged, of an unclear axis, or of another method
        return
    for name in kind.readers:
        tool = TOOLS[name]
        parts = _parts(tool, file, module, tensors, kind.scaling)
        if is_read(parts) and relative_error(tool, [parts], W0, W, float((W - W0).norm())) < BOUND:
            yield name


def _parts(
    tool: Tool, file: AdapterFile, module: str, tensors: Mapping[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """What a tool finds of a module, with alpha where it would find one."""
    parts = tool.without_lost(module, tool.roles(module, tensors), tensors)
    has_alpha = "alpha" in parts or tool.alpha(file.header, module, _RANK) is not None
    return {**parts, "alpha": torch.tensor(scaling * _RANK)} if has_alpha and "A" in parts else parts

"""Which tools compute from a file what it means, by its header alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import fitted
from dora_mm.formats.commands.cure import cure
from dora_mm.formats.commands.loading import load_of, without
from dora_mm.formats.commands.weight_errors import BOUND, ToolLoad, is_read, weight_errors
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.tools import tool_of
from dora_mm.formats.tools.tool import Tool
from dora_mm.registries.tools import other_tools

_ROWS, _COLUMNS, _RANK = 6, 5, 2  # of the weights on which formulas are compared
_OUTER, _INNER = 2, 3  # rows of the factors of a Kronecker product
_SIZES = {  # by role; rows and columns of a square weight are `_ROWS`
    **dict.fromkeys(("A", "hada_w1_b", "hada_w2_b", "lokr_w2_b", "glora_a2", "glora_b2"), (_RANK, _COLUMNS)),
    **dict.fromkeys(("B", "hada_w1_a", "hada_w2_a", "glora_b1"), (_ROWS, _RANK)),
    **dict.fromkeys(("mid", "hada_t1", "hada_t2", "lokr_t2"), (_RANK, _RANK)),
    "glora_a1": (_COLUMNS, _RANK),
    "lokr_w1": (_OUTER, 1),
    "lokr_w1_a": (_OUTER, _RANK),
    "lokr_w1_b": (_RANK, 1),
    "lokr_w2": (_INNER, _COLUMNS),
    "lokr_w2_a": (_INNER, _RANK),
}
_TURNED = {"hada_w1_a": "hada_t1", "hada_w2_a": "hada_t2", "lokr_w2_a": "lokr_t2"}  # with the middle factor of a role


def works_in(file: AdapterFile, scalings: Mapping[str, float], architecture: str | None) -> tuple[str, ...]:
    """The tools that compute from a file what it means, at strength 1: their formulas on small random weights.

    Args:
        file: The file, of which no tensor is read.
        scalings: Alpha / rank by module, of those with a rank.
        architecture: That of the model, as far as the names tell.

    Returns:
        Some of `other_tools`; none where a module is incomplete or of an unclear axis.
    """
    loaders = {name: load_of(file, name, architecture) for name in other_tools()}
    loaders = {name: load for name, load in loaders.items() if not load.refusal}
    known: set[_Kind] = set()
    for module, endings in file.modules.items():
        shapes = tuple((ending, file.shape(key)) for ending, key in endings.items())
        readers = tuple((name, load.lost[module]) for name, load in loaders.items() if module in load.lost)
        kind = _Kind(shapes, scalings.get(module, 1.0), module.startswith("text_encoder"), readers)
        if kind not in known:
            known.add(kind)
            right = set(_right(file, module, kind))
            loaders = {name: load for name, load in loaders.items() if name in right}
        if not loaders:
            break
    return tuple(loaders)


def misread_by(file: AdapterFile, right: Collection[str], architecture: str | None) -> dict[str, list[str]]:
    """The tools to draw with that load a file with magnitudes and compute something else from it.

    Args:
        file: The file.
        right: Those that `works_in` found.
        architecture: That of the model, as far as the names tell.

    Returns:
        Some of `other_tools`, by the options of `dora-mm convert` that make a file for them; empty options where there
        are none. Nothing for plain LoRA.
    """
    found: dict[str, list[str]] = {}
    if not any(map(file.axis, file.modules)):
        return found
    names = {name for group in file.groups(file.modules, Names())[0].values() for name in group.names}
    for name in other_tools():
        tool, load = tool_of(name), load_of(file, name, architecture)
        if name in right or not tool.computes.strengths or load.refusal:
            continue
        if any(is_read(tool.roles(module, file.modules[module])) for module in load.lost):
            found.setdefault(cure(file, name, names), []).append(name)
    return found


class _Kind(NamedTuple):
    """The properties of a module that decide which tools compute it correctly; a key for results shared by modules."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    scaling: float
    is_text: bool
    readers: tuple[tuple[str, frozenset[str]], ...]


def _right(file: AdapterFile, module: str, kind: _Kind) -> Iterable[str]:
    own, generator = tool_of(file.tool), torch.Generator().manual_seed(0)
    roles = {own.parts.get(ending, ""): shape for ending, shape in kind.shapes}
    A, B = roles.get("A", ()), roles.get("B", ())
    square = len(A) > 1 and A[1:2] == B[:1]
    sizes = {e: _small(own.parts.get(e, ""), shape, roles, file.axis(module), square) for e, shape in kind.shapes}
    tensors = {ending: torch.randn(size, generator=generator).abs() + 0.1 for ending, size in sizes.items()}
    kernel = max((size[2:] for size in sizes.values()), key=lambda size: (len(size), math.prod(size)), default=())
    shape = (_ROWS, _ROWS if square else _COLUMNS, *kernel)
    if "diff" in roles or "weight" in roles:
        shape = max(sizes.values(), key=len)
    W0 = torch.randn(shape, generator=generator)
    loads = []
    for name, lost in kind.readers:
        parts = _parts(tool_of(name), file, module, tensors, kind.scaling)
        loads.append(ToolLoad(name, without(parts, lost)))
    loads = [load for load in loads if is_read(load.parts)]
    try:
        layer = fitted(own.read(_parts(own, file, module, tensors, kind.scaling), None), W0)
        found = weight_errors(loads, W0, layer)
    except (ValueError, RuntimeError, IndexError):  # damaged, of an unclear axis, or of another method
        return
    for load, error in zip(loads, found.errors, strict=True):
        if found.relative(error) < BOUND:
            yield load.tool


def _small(role: str, shape: tuple[int, ...], roles: Collection[str], axis: str, square: bool) -> tuple[int, ...]:
    """A small shape of the same form."""
    columns, kernel = _ROWS if square else _COLUMNS, tuple(min(size, 3) for size in shape[2:])
    if role == "alpha":
        return ()
    if role == "m":
        long = columns if axis == "in" or (not axis and shape[:1] == (1,)) else _ROWS
        return tuple(long if size > 1 else 1 for size in shape)
    rows, inner = _SIZES.get(role, (_ROWS, _COLUMNS))
    found = (rows, columns if inner == _COLUMNS else inner)
    if _TURNED.get(role) in roles:
        found = found[::-1]
    return (*found, *kernel)[: max(len(shape), 1)]


def _parts(
    tool: Tool, file: AdapterFile, module: str, tensors: Mapping[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """The tensors of a module by role that a tool finds, with alpha where it would find one."""
    parts = tool.without_lost(module, tool.roles(module, tensors), tensors)
    if "A" not in parts:
        return parts
    has_alpha = "alpha" in parts or tool.in_header.alpha(file.header, module, _RANK) is not None
    return {**parts, "alpha": torch.tensor(scaling * _RANK)} if has_alpha else parts

"""The modules and tensors of a file that tools load, by module names and ends of keys, before any computation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.naming.known import reading
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import tool_of
from dora_mm.formats.tools.parts import Parts
from dora_mm.formats.tools.tool import Export

NOTHING_LOST: frozenset[str] = frozenset()


class Load(NamedTuple):
    """The modules of a file that a tool loads.

    Attributes:
        lost: By the module whose name it knows: the roles of tensors that it does not read.
        refusal: Why it loads nothing, as the end of a sentence that begins with its name; else empty.
    """

    lost: Mapping[str, frozenset[str]]
    refusal: str = ""


def load_of(file: AdapterFile, tool: str, architecture: str | None) -> Load:
    """Finds the modules of a file that a tool loads.

    Args:
        file: The file.
        tool: A key of `TOOLS`.
        architecture: That of the model; None where it is none that has names of its own.
    """
    lost, raises = known_modules(tool, architecture, file.modules)
    known = {module: file.modules[module] for module in lost}
    unknown = [key for module, endings in file.modules.items() if module not in lost for key in endings.values()]
    if raises and unknown:
        return Load({}, f"raises an error at {unknown[0]:.100}, and loads nothing")
    return Load(lost, tool_of(tool).refuses(known, [*unknown, *file.unnamed], file.header))


def known_modules(
    tool: str, architecture: str | None, modules: Mapping[str, Collection[str]]
) -> tuple[Mapping[str, frozenset[str]], bool]:
    """The modules whose names a tool knows, and whether it loads nothing where there are others: see `Reading`."""
    found = tool_of(tool)
    if found.table:
        return reading(found.table, architecture, modules)
    return {module: NOTHING_LOST for module in modules if found.names.match(module)}, False


def readers_of(
    tools: Collection[str], export: Export, modules: Collection[str], architecture: str | None, *, is_lora: bool
) -> tuple[str, ...]:
    """Selects the tools that know all the names which an export gives to modules.

    Args:
        tools: The names of the tools.
        export: The export.
        modules: The names in its file.
        architecture: That of the model.
        is_lora: Whether none of the modules has a magnitude.
    """
    one = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1), "magnitude": torch.ones(2)}
    layer = LayerState(DoRASpec(1), one)
    if export.difference:
        layer = LayerState(DoRASpec(method="full"), {"diff": torch.ones(2, 2)})
    elif is_lora:
        layer = LayerState(DoRASpec(1, method="lora"), {name: one[name] for name in ("lora_A", "lora_B")})
    W0 = torch.ones(2, 2)
    found = {module: export.tensors(module, layer, W0) for module in modules}
    return tuple(tool for tool in tools if len(known_modules(tool, architecture, found)[0]) == len(found))


def without(parts: Parts, lost: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a module by role, but for those that a tool does not read."""
    return {role: tensor for role, tensor in parts.items() if role not in lost}

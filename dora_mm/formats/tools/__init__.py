"""The tools: how each names the tensors of an adapter, what weight it computes from them, and how it writes them.

One file is one tool, named in `dora_mm/registries/tools.py`; what they share is in `tool.py`, `parts.py`,
`formulas.py`, `products.py`, `peft_config.py`, `patterns.py` and `methods.py`.
"""

from __future__ import annotations

from functools import cache

from dora_mm.formats.tools import diffusers, native, peft
from dora_mm.formats.tools.tool import Export, Format, Tool
from dora_mm.registries.registry import load
from dora_mm.registries.tools import EXPORT_FORMATS, TOOLS, readers

FORMATS: dict[str, Format] = {"diffusers": diffusers.FORMAT, "peft": peft.FORMAT, "native": native.FORMAT}


@cache
def tool_of(name: str) -> Tool:
    """A tool by its name in the registry."""
    return load(TOOLS[name].tool)


@cache
def export_of(name: str) -> Export:
    """The `Export` of an export format by its name, where it has one of its own."""
    return load(EXPORT_FORMATS[name].export)


@cache
def all_tools() -> dict[str, Tool]:
    """All tools, in the order in which a file is matched against them."""
    return {name: tool_of(name) for name in readers()}


@cache
def all_exports() -> dict[str, Export]:
    """The `Export` of each export format that has one of its own."""
    return {name: export_of(name) for name, record in EXPORT_FORMATS.items() if record.export}

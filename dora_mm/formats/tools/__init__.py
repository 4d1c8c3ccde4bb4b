"""The tools: how each names the tensors of an adapter, what weight it computes from them, and how it writes them.

One file is one tool, named in `registry.py`; what they share is in `tool.py`, `parts.py`, `formulas.py`, `products.py`,
`peft_config.py`, `patterns.py` and `methods.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from dora_mm.formats.registry import TARGETS
from dora_mm.formats.registry import TOOLS as ROWS
from dora_mm.formats.tools import diffusers, native, peft
from dora_mm.formats.tools.tool import Export, Tool


def _found(where: str) -> Any:
    module, _, name = where.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


TOOLS: dict[str, Tool] = {
    name: replace(_found(row.where), title=row.title, version=row.version) for name, row in ROWS.items()
}
EXPORTS: dict[str, Export] = {name: _found(row.where) for name, row in TARGETS.items() if row.where}
FORMATS = {"diffusers": diffusers.EXPORT, "peft": peft.EXPORT, "native": native.EXPORT}  # of `save_adapter`

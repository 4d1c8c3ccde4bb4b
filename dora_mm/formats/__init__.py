"""Adapter files: what is trained is written to them, and what any tool wrote is read.

A file is opened (`adapter_file.py`), its modules are read into the neutral form (`state.py`) by what its tool says in
`tools/`, and put into models. Writing goes the other way, by the same modules of `tools/`. Names are loaded on first
use, so that the command line can read `registry.py` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_mm.formats.adapter_file import AdapterFile, adapter_folder, find_file
    from dora_mm.formats.adapters import format_for, load, remove_other_formats, save, write_card
    from dora_mm.formats.layers import read
    from dora_mm.formats.tools import FORMATS

__all__ = [
    "FORMATS",
    "AdapterFile",
    "adapter_folder",
    "find_file",
    "format_for",
    "load",
    "read",
    "remove_other_formats",
    "save",
    "write_card",
]
_ELSEWHERE = {"FORMATS": "tools", "read": "layers"}
_ELSEWHERE |= dict.fromkeys(("AdapterFile", "adapter_folder", "find_file"), "adapter_file")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'adapters')}"), name)

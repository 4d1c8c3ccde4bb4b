"""Adapter files: what is trained is written to them, and what any tool wrote is read.

The way of a file: `adapter_file.py` opens it; `reader.py` reads its modules into the neutral form, by what their tool
says in `tools/`; `state.py` is that form; `models.py` puts it into models; `adapters.py` is the whole way, and back.
Names are loaded on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_mm.formats.adapter_file import AdapterFile, adapter_folder, find_file
    from dora_mm.formats.adapters import about_format, format_for, load, remove_other_formats, save, write_model_card
    from dora_mm.formats.identity import adapter_digest
    from dora_mm.formats.reader import read
    from dora_mm.formats.tools import FORMATS

__all__ = [
    "FORMATS",
    "AdapterFile",
    "about_format",
    "adapter_digest",
    "adapter_folder",
    "find_file",
    "format_for",
    "load",
    "read",
    "remove_other_formats",
    "save",
    "write_model_card",
]
_ELSEWHERE = {"FORMATS": "tools", "adapter_digest": "identity", "read": "reader"}
_ELSEWHERE |= dict.fromkeys(("AdapterFile", "adapter_folder", "find_file"), "adapter_file")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'adapters')}"), name)

"""Forge: ComfyUI's formula, but a file with more than 12 keys that it does not know is dropped as a whole."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dora_mm.formats.tools import comfy
from dora_mm.formats.tools.formulas import IN_TURN
from dora_mm.formats.tools.tool import Header, Modules

MOST_UNREAD = 12


def refuses(modules: Modules, others: Collection[str], header: Header) -> str:
    unread = comfy.TOOL.unread(modules, [key for key in others if not key.endswith((".diff_b", ".b_norm"))])
    if len(unread) <= MOST_UNREAD:
        return ""
    return f"drops the file, since {len(unread)} keys have names that it does not know, such as {unread[0]:.100}"


TOOL = replace(comfy.TOOL, table="forge", wrote_header=None, refuses=refuses, cautions=(IN_TURN,))

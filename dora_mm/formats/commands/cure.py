"""What to convert a file to for a tool that does not compute from it what it means."""

from __future__ import annotations

from collections.abc import Collection

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.tools import all_exports, tool_of
from dora_mm.formats.tools.comfy import other_half
from dora_mm.formats.tools.parts import NO_LOW_RANK

NEW_RANK = 32  # at which it is fitted anew where the form cannot hold it


def cure(file: AdapterFile, tool: str, components: Collection[str]) -> str:
    """The options of `dora-mm convert` that make a file which a tool computes right; empty where there are none.

    Args:
        file: The file.
        tool: Its name.
        components: The components that the file adapts.
    """
    target = None if other_half(file.header) else _target(file, tool, components)
    if target is None:
        return ""
    holds = all_exports()[target].holds
    columns = not holds.columns and any(file.axis(module) == "in" for module in file.modules)
    diffs = not holds.diffs and any(endings.keys() & NO_LOW_RANK for endings in file.modules.values())
    return f"--to {target}" + (f" --rank {NEW_RANK} --allow-lossy" if columns or diffs else "")


def _target(file: AdapterFile, tool: str, components: Collection[str]) -> str | None:
    """The first target that is written for the tool and has a place for what the file adapts."""
    convolutions = any(len(file.shape(key)) > 2 for endings in file.modules.values() for key in endings.values())
    possible = {
        name: export
        for name, export in all_exports().items()
        if export.spelling.styles.keys() >= set(components)
        and (name != "peft" or len(components) == 1)
        and (export.holds.convolutions or not convolutions)
    }
    if tool_of(tool).names.match("lora_unet_") and tool != "diffusers" and not any(map(file.axis, file.modules)):
        return "kohya" if "kohya" in possible else None  # plain LoRA
    return next((name for name, export in possible.items() if tool in export.read_by), None)

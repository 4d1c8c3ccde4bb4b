"""What to convert a file to for a tool that does not compute from it what it means."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.commands.loading import readers_of
from dora_mm.formats.naming.names import Name, architecture_of
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.tools import all_exports, tool_of
from dora_mm.formats.tools.parts import NO_LOW_RANK
from dora_mm.formats.tools.tool import Export

NEW_RANK = 32  # at which it is fitted anew where the form cannot hold it


def cure(file: AdapterFile, tool: str, names: Collection[Name], known: Iterable[Name] = ()) -> str:
    """The options of `dora-mm convert` that make a file which a tool computes right; empty where there are none.

    Args:
        file: The file.
        tool: Its name.
        names: The modules that the file adapts.
        known: The names of the base model.
    """
    target = _target(file, tool, names, known)
    if target is None:
        return ""
    holds = all_exports()[target].holds
    columns = not holds.columns and any(file.axis(module) == "in" for module in file.modules)
    diffs = not holds.diffs and any(endings.keys() & NO_LOW_RANK for endings in file.modules.values())
    return f"--to {target}" + (f" --rank {NEW_RANK} --allow-lossy" if columns or diffs else "")


def _target(file: AdapterFile, tool: str, names: Collection[Name], known: Iterable[Name]) -> str | None:
    """The first target for the tool that has a place for what the file adapts, under names that the tool knows."""
    components = {name.component for name in names}
    convolutions = any(len(file.shape(key)) > 2 for endings in file.modules.values() for key in endings.values())
    possible = {
        name: export
        for name, export in all_exports().items()
        if export.spelling.styles.keys() >= set(components)
        and (name != "peft" or len(components) == 1)
        and (export.holds.convolutions or not convolutions)
    }
    plain = not any(map(file.axis, file.modules))
    for_it = {name: export for name, export in possible.items() if tool in export.read_by}
    if plain and tool != "diffusers" and "kohya" in possible and "lora_down.weight" in tool_of(tool).parts:
        for_it = {"kohya": possible["kohya"], **for_it}  # which all compute alike
    known = list(known)
    return next((name for name, export in for_it.items() if _knows_all(tool, export, names, known, plain)), None)


def _knows_all(tool: str, export: Export, names: Collection[Name], known: Collection[Name], plain: bool) -> bool:
    try:
        written = Names(known).write(names, export.spelling)
    except ValueError:
        return False
    return tool in readers_of((tool,), export, written, architecture_of(known) or architecture_of(names), plain=plain)

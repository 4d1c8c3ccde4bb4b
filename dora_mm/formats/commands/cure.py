"""The conversion that makes a file work in a tool which computes something else from it."""

from __future__ import annotations

from collections.abc import Collection

import torch

from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.commands import extras
from dora_mm.formats.commands.export_check import check_peft_takes
from dora_mm.formats.commands.loading import readers_of
from dora_mm.formats.naming.names import Name, architecture_of
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.tools import all_exports, tool_of
from dora_mm.formats.tools.parts import NO_LOW_RANK
from dora_mm.formats.tools.tool import Export

NEW_RANK = 32  # at which it is fitted anew where the form cannot hold it


def cure(file: AdapterFile, tool: str, names: Collection[Name], layers: LayerReader | None = None) -> str:
    """The options of `dora-mm convert` that make a file which a tool computes right; empty where there are none.

    Args:
        file: The file.
        tool: Its name.
        names: The modules that the file adapts.
        layers: What `convert` would read of it, on the base model; None where that is not known.
    """
    to = _export_format(file, tool, names, layers)
    if to is None:
        return ""
    holds, given = all_exports()[to].holds, layers.axis if layers else None
    axes = {given if given and axis == "?" else axis for axis in map(file.axis, file.modules)}
    fits = ("in" in axes and not holds.columns) or (_has_no_rank(file) and not holds.diffs)
    return f"--to {to}" + (f" --rank {NEW_RANK}" if fits else "") + (f" --axis {given}" if given else "")


def _has_no_rank(file: AdapterFile) -> bool:
    """Whether a module has no low rank; norms, which have none, are for forms that can hold them."""
    return any(found.keys() & NO_LOW_RANK for module, found in file.modules.items() if not file.is_norm(module))


def _export_format(file: AdapterFile, tool: str, names: Collection[Name], layers: LayerReader | None) -> str | None:
    """The first export format for the tool that can hold what is in the file, under names that the tool knows."""
    components = {name.component for name in names}
    convolutions = any(len(file.shape(key)) > 2 for endings in file.modules.values() for key in endings.values())
    possible = {
        name: export
        for name, export in all_exports().items()
        if export.spelling.styles.keys() >= set(components)
        and (name != "peft" or len(components) == 1)
        and (export.holds.convolutions or not convolutions)
    }
    is_lora = not any(map(file.axis, file.modules))
    for_it = {name: export for name, export in possible.items() if tool in export.read_by}
    parts = tool_of(tool).parts
    reads_kohya = "lora_down.weight" in parts and ("diff" in parts or not _has_no_rank(file))
    if is_lora and tool != "diffusers" and "kohya" in possible and reads_kohya:
        for_it = {"kohya": possible["kohya"], **for_it}  # which all compute alike
    return next((name for name, export in for_it.items() if _fits(tool, name, export, names, layers, is_lora)), None)


def _fits(
    tool: str, to: str, export: Export, names: Collection[Name], layers: LayerReader | None, is_lora: bool
) -> bool:
    """Whether an export format takes all that a file holds, and a tool all that it writes."""
    known = (layers.weights if layers else None) or ()
    try:
        written = Names(known).write(names, export.spelling)
        keys = _with_extras(to, export, layers) if layers else []
    except ValueError:
        return False
    if keys and tool_of(tool).refuses({module: {} for module in written}, keys, {}):
        return False
    return tool in readers_of(
        (tool,), export, written, architecture_of(known) or architecture_of(names), is_lora=is_lora
    )


def _with_extras(to: str, export: Export, layers: LayerReader) -> list[str]:
    """The keys that an export format writes and that belong to no module.

    Raises:
        ValueError: It cannot hold all of the file, or PEFT would not find the modules in the class of the model.
    """
    if any(map(layers.transposed, layers.names())):
        raise ValueError("the base stores a weight transposed")
    if to == "peft":
        check_peft_takes(layers.weights, layers.names(), "dora" if layers.any_magnitude() else "lora")
    extras.leave_out(layers, to, export, allow_lossy=False)
    keys = list(layers.extras().embeddings) if export.holds.tokens == "inside" else []
    if export.holds.extras:
        keys += [key for key, _ in extras.bias_tensors(layers, export.spelling, 1.0, torch.float32)]
    return keys

"""What the person has to know who loads converted files in another tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_mm.formats.adapter_file import AdapterFile

ONETRAINER = {
    "out": "the magnitudes are those of output rows: set OneTrainer's option for them (its default is columns)",
    "in": "the magnitudes are those of input columns, as OneTrainer's default is",
}


def how_to_use(to: str | None, files: Sequence[Path]) -> str:
    """How files that were written for a target are used; empty where there is nothing special."""
    if to == "comfy":
        first, second = (file.name for file in files)
        return (
            f"load both files in ComfyUI, {first} first and {second} after it, with the same strength: in the other "
            "order the result is wrong"
        )
    if to == "onetrainer":
        file = AdapterFile(files[0])
        axes = {file.axis(module) for module in file.modules} - {""}
        if len(axes) > 1:
            return "some magnitudes are those of output rows and some of input columns, and OneTrainer has one option"
        return "".join(ONETRAINER[axis] for axis in axes)
    return ""

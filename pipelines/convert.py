"""dora-mm convert: an adapter file in the form of another tool, checked with that tool's formula."""

from pathlib import Path
from typing import Any

from dora_mm.config.paths import resolve_adapter, resolve_model
from dora_mm.formats.commands.beside import named
from dora_mm.formats.commands.convert import Conversion, convert
from dora_mm.formats.commands.export_check import ToolErrors
from dora_mm.formats.commands.inspection import misreaders
from dora_mm.models.opening import base_of
from dora_mm.utils.tables import aligned_columns

SHOWN = 5  # modules whose errors are named


def main(source: str, out: str, to: str, *, base: str | None = None, **settings: Any) -> None:
    """Converts a file, and prints what the tools compute from the result.

    Args:
        source: An adapter file of any tool, its folder or run directory.
        out: A file that ends in .safetensors, or a folder.
        to: A name in `dora_mm.registries.tools.TARGETS`.
        base: The model: a folder, a single-file checkpoint or a hub name; None: the one that the file
            names, where it is on this machine.
        settings: The other arguments of `dora_mm.formats.commands.convert.convert`.

    Raises:
        ValueError: The adapter, the model or a setting cannot be used, or the target cannot hold the adapter.
    """
    file = resolve_adapter(source, "IN")
    model = base_of(file) if base is None else resolve_model(base, "--base")
    done = convert(file, Path(out).expanduser(), to=to, base=model, **settings)
    if base is None and model is not None:
        print(f"base     {model}, as the header says")
    for file in done.files:
        print(f"written  {file}, {done.num_modules} modules")
    if done.left_out:
        print(f"left out {named(done.left_out)}")
    if done.usage:
        print(f"use      {done.usage}")
    if others := misreaders(done.files[0], to):
        print(f"not for  {others}")
    if done.errors:
        print(f"\n{table(done)}")
        worst = max(done.errors, key=lambda errors: errors.overall)
        if to == "lora" or worst.overall > 1e-2:
            print(f"\n{worst_modules(worst)}")


def table(done: Conversion) -> str:
    """The errors of every tool, by strength; of several strengths only where a tool has them."""
    others = [t for errors in done.errors for t in errors.at] if done.on_base else []  # they depend on the base
    strengths = sorted({1.0, *others})
    rows = [("error with", *(f"strength {t:g}" for t in strengths))]
    for errors in done.errors:
        found = {1.0: errors.overall, **errors.at}
        rows.append((errors.tool, *(f"{found[t]:.1e}" if t in found else "-" for t in strengths)))
    where = "of the update on the base model" if done.on_base else "of the update, on random weights: no --base"
    return f"{aligned_columns(rows, num_text=1)}\n({where})"


def worst_modules(errors: ToolErrors) -> str:
    """The modules with the largest errors."""
    worst = sorted(errors.layers.items(), key=lambda item: -item[1])[:SHOWN]
    rows = [("largest errors", ""), *((module, f"{error:.1e}") for module, error in worst)]
    return aligned_columns(rows, num_text=1)

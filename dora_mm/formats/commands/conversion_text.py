"""The text that `convert` prints about its result."""

from __future__ import annotations

import re

from dora_mm.formats.commands.convert import Conversion
from dora_mm.formats.commands.export_check import ToolErrors
from dora_mm.formats.commands.extras import named
from dora_mm.formats.commands.inspection import misreaders
from dora_mm.formats.tools.peft import FILE_NAME
from dora_mm.utils.shell import command_line
from dora_mm.utils.tables import aligned_columns

# Modules outside of the language model, by their names in transformers
OF_IMAGES = re.compile(r"\b(?:visual|vision\w*|multi_modal_projector|connector|embed_vision|resampler|aligner)\b")
SHOWN = 5  # modules whose errors are named
INEXACT = 1e-2  # an error that is seen
MEASURE = "distance from the exact result as a share of the adapter's update: 0 is exact, 1 is as far off as no adapter"


def conversion_text(done: Conversion, to: str) -> str:
    """The files, what has to be known of them, and what the tools compute from them.

    Args:
        done: What was written.
        to: The export format.
    """
    lines = [f"written  {file}, {done.num_modules} modules" for file in done.files]
    if done.ranks:
        low, middle, high = done.ranks[0], done.ranks[len(done.ranks) // 2], done.ranks[-1]
        lines.append(f"rank     {low}" if low == high else f"rank     {low} to {high}, {middle} in the middle")
    if done.left_out:
        lines.append(f"left out {named(done.left_out)}")
    if done.usage:
        lines.append(f"use      {done.usage}")
    if others := misreaders(done.files[0], to):
        lines.append(f"not for  {others}")
    if to == "lora" and (found := [name for name in done.modules if OF_IMAGES.search(name)]):
        lines.append(
            f"note     {len(found)} of these modules are outside of the language model, such as {found[0]}. vLLM and "
            "llama.cpp ignore them; dora-mm merge keeps them (docs/serving.md)"
        )
    if to == "lora" and done.ranks and done.files[0].name == FILE_NAME:
        rank = max(8, 1 << (done.ranks[-1] - 1).bit_length())  # vLLM takes powers of two from 8 on
        options = ("--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"mine={done.files[0].parent}")
        lines.append(f"serve    {command_line('vllm', 'serve', 'MODEL', *options)}, if vLLM supports this model")
    if done.errors:
        lines += ["", table(done)]
        worst = max(done.errors, key=lambda errors: errors.overall)
        if done.ranks or worst.overall > INEXACT:
            lines += ["", worst_modules(worst)]
    return "\n".join(lines)


def table(done: Conversion) -> str:
    """The errors of every tool, by strength; of several strengths only where a tool has them."""
    others = [t for errors in done.errors for t in errors.at] if done.on_base else []  # they depend on the base
    strengths = sorted({1.0, *others})
    rows = [("error with", *(f"strength {t:g}" for t in strengths))]
    for errors in done.errors:
        found = {1.0: errors.overall, **errors.at}
        rows.append((errors.tool, *(f"{found[t]:.1e}" if t in found else "-" for t in strengths)))
    where = "" if done.on_base else "; on random weights, since there is no --base"
    scaled_otherwise = [each.tool for each in done.errors if each.overall <= INEXACT < max(each.at.values(), default=0)]
    at_1 = f"\nright at strength 1 only: {', '.join(scaled_otherwise)}" if scaled_otherwise and done.on_base else ""
    return f"{aligned_columns(rows, num_text=1)}\n({MEASURE}{where}){at_1}"


def worst_modules(errors: ToolErrors) -> str:
    """The modules with the largest errors."""
    worst = sorted(errors.layers.items(), key=lambda item: -item[1])[:SHOWN]
    rows = [("largest errors", ""), *((module, f"{error:.1e}") for module, error in worst)]
    return aligned_columns(rows, num_text=1)

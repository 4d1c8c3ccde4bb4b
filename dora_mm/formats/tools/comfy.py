"""ComfyUI, Forge and reForge: `.dora_scale`, by the axis that its shape says.

They divide by ||W0|| on the output axis and by ||W0 + s B A|| on the input axis; with ComfyUI's pull request 15458,
which was open in August 2026, by the latter on both. Two forms hold for every version:

- a pair of files, one applied after the other: the first scales the rows, with B = 0 and the magnitude g ||W0||, the
  second is plain LoRA with B' = s g B;
- `.diff`, W' - W0.

Which names it reads depends on the architecture. Of diffusers' UNet it reads those without `.to_` (it looks for
`.processor.to_`), so that a file of diffusers is loaded by half, and without its magnitudes.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.exact import gain, norms
from dora_mm.formats.naming.spellings import COMFY
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import formulas, products
from dora_mm.formats.tools.formulas import Computation
from dora_mm.formats.tools.parts import LYCORIS_PARTS, OLD_PARTS, Parts, kohya_tensors, neutral
from dora_mm.formats.tools.tool import Export, Header, Holds, Tool

PARTS = {**LYCORIS_PARTS, **products.GLORA, **OLD_PARTS, "lora_A.weight": "A", "lora_B.weight": "B"}
TARGET_KEY = "dora_mm_target"  # says for which version a magnitude was written: the tensors cannot
PAIR_TARGETS = ("comfy, file 1 of 2", "comfy, file 2 of 2")


# --- reading ---------------------------------------------------------------------------------------------------------


def other_half(header: Header) -> str:
    """What a person has to know who has one file of a pair; empty for other files."""
    if header.get(TARGET_KEY) not in PAIR_TARGETS:
        return ""
    number = PAIR_TARGETS.index(header[TARGET_KEY]) + 1
    return f"it is file {number} of a pair, and means the adapter only together with file {3 - number}"


def read_2025(parts: Parts, axis: str | None) -> LayerState:
    state = neutral(parts, axis)
    return replace(state, norm="base") if state.axis == "out" else state


# --- writing ---------------------------------------------------------------------------------------------------------


def write_2025(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    """With the magnitude m ||W0|| / ||V||, which is g ||W0||."""
    if layer.axis == "out" and "magnitude" in layer.tensors:
        magnitude = (gain(layer, W0) * norms(W0, "out")).flatten()
        layer = replace(layer, tensors={**layer.tensors, "magnitude": magnitude})
    return kohya_tensors(layer)


def with_gain(layer: LayerState, W0: Tensor) -> LayerState:
    """The adapter with g, which both files of the pair need."""
    return replace(layer, tensors={**layer.tensors, "gain": gain(layer, W0)})


def write_rows(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    """The first file of the pair; nothing for plain LoRA."""
    if "magnitude" not in layer.tensors:
        return {}
    magnitude = (layer.tensors["gain"] * norms(W0, "out")).flatten()
    zeros = {"lora_A": torch.zeros(1, *W0.shape[1:]), "lora_B": torch.zeros(W0.shape[0], 1)}
    return kohya_tensors(LayerState(DoRASpec(rank=1), {**zeros, "magnitude": magnitude}))


def write_low_rank(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    """The second file of the pair."""
    g = layer.tensors["gain"].reshape(-1, 1)
    tensors = {"lora_A": layer.tensors["lora_A"], "lora_B": layer.tensors["lora_B"].to(g.dtype) * g}
    return kohya_tensors(LayerState(replace(layer.spec, method="lora"), tensors))


def usage_of_pair(first: str, second: str) -> str:
    """What a person has to know who loads the two files, by their names."""
    return (
        f"load both files in ComfyUI, {first} first and {second} after it, with the same strength: in the other "
        "order the result is wrong"
    )


CAUTIONS = (
    formulas.IN_TURN,
    "the nodes that load in bypass mode, for quantised models, leave magnitudes out: take --to diff, or plain LoRA of "
    "--to lora",
)
TOOL_2025 = Tool(
    parts=PARTS,
    table="comfyui",
    computes=Computation(formulas.over_base, "divides by the norm of W0 on the output axis"),
    wrote_header=re.compile(f"{TARGET_KEY}=comfy-2025$"),
    read=read_2025,
    cautions=CAUTIONS,
)
TOOL_15458 = Tool(
    parts=PARTS,
    table="comfyui",
    computes=Computation(formulas.over_updated, "divides by the norm of the updated weight"),
    wrote_header=re.compile(f"{TARGET_KEY}=comfy-15458$"),
    wrote_key=re.compile(r"diffusion_model\."),
    cautions=CAUTIONS,
)
EXPORT_2025 = Export(
    write_2025,
    COMFY,
    read_by=("comfy-2025", "forge"),
    holds=Holds(beside=True),
    header=lambda contents: {TARGET_KEY: "comfy-2025"},
    needs_base=True,
)
EXPORT_15458 = Export(
    kohya_tensors,
    COMFY,
    read_by=("comfy-15458",),
    holds=Holds(beside=True),
    header=lambda contents: {TARGET_KEY: "comfy-15458"},
)
EXPORT_DIFF = Export(
    kohya_tensors,
    COMFY,
    read_by=("comfy-2025", "comfy-15458", "a1111", "sdnext", "invokeai", "lycoris"),
    holds=Holds(beside=True),
    needs_base=True,
    difference=True,
)
PAIR = tuple(
    Export(
        write,
        COMFY,
        read_by=("comfy-2025", "comfy-15458"),
        holds=Holds(columns=False, diffs=False),
        header=lambda contents, target=target: {TARGET_KEY: target},
        needs_base=True,
        prepare=with_gain,
    )
    for write, target in zip((write_rows, write_low_rank), PAIR_TARGETS, strict=True)
)

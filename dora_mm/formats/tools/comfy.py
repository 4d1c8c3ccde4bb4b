"""ComfyUI, Forge and reForge: `.dora_scale`, by the axis that its shape says.

They divide by ||W0|| on the output axis and by ||W0 + s B A|| on the input axis; ComfyUI's pull request 15458,
which was open in August 2026, has the latter on both.

Which names it reads depends on the architecture. Of diffusers' UNet it reads those without `.to_` (it looks for
`.processor.to_`), so that a file of diffusers is loaded by half, and without its magnitudes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from dora_mm.formats.algebra.exact import gain, norms
from dora_mm.formats.naming.spellings import COMFY
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import formulas, products
from dora_mm.formats.tools.formulas import Computation
from dora_mm.formats.tools.parts import LYCORIS_PARTS, OLD_PARTS, Parts, kohya_tensors, neutral
from dora_mm.formats.tools.tool import Export, Holds, Tool

PARTS = {**LYCORIS_PARTS, **products.GLORA, **OLD_PARTS, "lora_A.weight": "A", "lora_B.weight": "B"}
TARGET_KEY = "dora_mm_target"  # says for which version a magnitude was written: the tensors cannot


# --- reading ---------------------------------------------------------------------------------------------------------


def read(parts: Parts, axis: str | None) -> LayerState:
    state = neutral(parts, axis)
    return replace(state, norm="base") if state.axis == "out" else state


# --- writing ---------------------------------------------------------------------------------------------------------


def write(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    """With the magnitude m ||W0|| / ||V||, which is g ||W0||."""
    if layer.axis == "out" and "magnitude" in layer.tensors:
        magnitude = (gain(layer, W0) * norms(W0, "out")).flatten()
        layer = replace(layer, tensors={**layer.tensors, "magnitude": magnitude})
    return kohya_tensors(layer)


CAUTIONS = (
    formulas.IN_TURN,
    "its pull request 15458, not merged in 2026-08, takes the trainers' norm: with it, write --to kohya",
    "the nodes that load in bypass mode, for quantised models, leave magnitudes out: take --to diff, or plain LoRA of "
    "--to lora",
)
TOOL = Tool(
    parts=PARTS,
    table="comfyui",
    computes=Computation(formulas.over_base, "divides by the norm of W0 on the output axis"),
    wrote_header=re.compile(f"{TARGET_KEY}=comfy$"),
    read=read,
    cautions=CAUTIONS,
)
EXPORT = Export(
    write,
    COMFY,
    read_by=("comfy", "forge"),
    holds=Holds(extras=True),
    header=lambda contents: {TARGET_KEY: "comfy"},
    needs_base=True,
)
EXPORT_DIFF = Export(
    kohya_tensors,
    COMFY,
    read_by=("comfy", "a1111", "sdnext", "invokeai", "kohya"),
    holds=Holds(extras=True),
    needs_base=True,
    difference=True,
)

"""Files without a prefix, or with keys of older releases, which ComfyUI, OneTrainer and others read in part.

    <path>.lora_A.weight, .lora_A.default.weight, .lora.down.weight, .lora_down.weight     A
    <path>.lora_magnitude_vector[.weight], .magnitude, .dora_scale                         the magnitude

The path is diffusers' or the network's own, after `base_model.model.` where PEFT's config is missing, or after
ComfyUI's `diffusion_model.`, which many trainers write. It is the form of no tool in particular: alpha is the rank
where there is none.
"""

from __future__ import annotations

import re

from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import comfy
from dora_mm.formats.tools.formulas import Computation, over_updated_rows
from dora_mm.formats.tools.parts import BARE_NAMES, Parts, neutral, with_rows
from dora_mm.formats.tools.tool import Tool

_PREFIX = r"((base_model\.model|unet|transformer|text_encoder(_2)?)\.)?"
PARTS = {
    **comfy.PARTS,
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_magnitude_vector.default.weight": "m",
    "magnitude": "m",
}
_KEYS = "|".join(map(re.escape, sorted(PARTS.keys() - {"down", "up"})))


def read(parts: Parts, axis: str | None) -> LayerState:
    return neutral(with_rows(parts), axis)


TOOL = Tool(
    names=re.compile(""),
    parts=PARTS,
    computes=Computation(over_updated_rows, "computes what the paper does"),
    wrote_key=re.compile(
        rf"diffusion_model\.|({_PREFIX}{BARE_NAMES}|text_)(.*\.)?({_KEYS}|\w+_lora[12]?\.(down|up)\.weight)$"
    ),
    read=read,
)

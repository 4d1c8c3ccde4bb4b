"""InvokeAI: `.dora_scale` scales input columns, whatever its shape, as in AUTOMATIC1111."""

from __future__ import annotations

import re
from collections.abc import Collection

from dora_mm.formats.tools.formulas import IN_TURN, Computation, over_columns
from dora_mm.formats.tools.parts import LYCORIS_PARTS
from dora_mm.formats.tools.tool import Header, Modules, Tool

_UNET = re.compile(r"(unet|text_encoder(_2)?)\.|(lora_unet_|lycoris_)?((down|up|input|output)_blocks|mid(dle)?_block)")
_KOHYA = re.compile(r"lora_(unet|te[12]?)_")
_SGM, _DIFFUSERS = (re.compile(rf"lora_unet_({blocks})") for blocks in (r"(in|out)put_|middle", r"(down|up)_bl|mid_"))


def refuses(modules: Modules, others: Collection[str], header: Header) -> str:
    """Its loader for Stable Diffusion raises an error where a name is none of kohya's, or only some are SGM's."""
    names = [*modules, *others]
    if not any(map(_UNET.match, names)):
        return ""
    if unknown := next((name for name in names if not _KOHYA.match(name)), None):
        return f"raises an error at the name {unknown:.100}, and loads nothing"
    if any(map(_SGM.match, names)) and any(map(_DIFFUSERS.match, names)):
        return "raises an error, since some names are SGM's and some are diffusers', and loads nothing"
    if any("dora_scale" in endings and "lora_up.weight" not in endings for endings in modules.values()):
        return "raises an error at magnitudes of another method than LoRA, and loads nothing"
    return ""


TOOL = Tool(
    parts={**LYCORIS_PARTS, "lora_A.weight": "A", "lora_B.weight": "B"},
    table="invokeai",
    computes=Computation(over_columns, "takes the norms of input columns", axis="in"),
    refuses=refuses,
    cautions=(IN_TURN,),
)

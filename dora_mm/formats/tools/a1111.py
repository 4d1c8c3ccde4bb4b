"""AUTOMATIC1111's web UI since 1.10: `.dora_scale` scales input columns, whatever its shape: (O, 1) broadcasts."""

from __future__ import annotations

from dora_mm.formats.tools.formulas import IN_TURN, Computation, over_columns
from dora_mm.formats.tools.parts import LYCORIS_PARTS, OLD_KOHYA_NAMES
from dora_mm.formats.tools.tool import Tool

TOOL = Tool(
    names=OLD_KOHYA_NAMES,
    parts=LYCORIS_PARTS,
    computes=Computation(over_columns, "takes the norms of input columns", axis="in"),
    cautions=(IN_TURN,),
)

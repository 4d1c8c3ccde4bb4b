"""AUTOMATIC1111's web UI since 1.10: `.dora_scale` scales input columns, whatever its shape: (O, 1) broadcasts."""

from __future__ import annotations

from dora_mm.formats.tools.formulas import IN_TURN, Computation, over_columns
from dora_mm.formats.tools.parts import LYCORIS_PARTS
from dora_mm.formats.tools.tool import Tool

TOOL = Tool(
    parts=LYCORIS_PARTS,
    table="a1111",
    computes=Computation(over_columns, "takes the norms of input columns", axis="in"),
    cautions=(IN_TURN,),
)

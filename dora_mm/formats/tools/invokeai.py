"""InvokeAI: `.dora_scale` scales input columns, whatever its shape, as in AUTOMATIC1111."""

from __future__ import annotations

import re

from dora_mm.formats.tools import a1111
from dora_mm.formats.tools.parts import KOHYA_NAMES, KOHYA_PARTS
from dora_mm.formats.tools.tool import Tool

TOOL = Tool(
    names=re.compile(rf"{KOHYA_NAMES.pattern}|transformer\.|diffusion_model\."),
    parts={**KOHYA_PARTS, "lora_A.weight": "A", "lora_B.weight": "B"},
    apply=a1111.apply,
    differs="takes the norms of input columns",
    axis="in",
)

"""The checkpoints of DoRA's authors (NVlabs/DoRA): PEFT's names, the magnitude as `.weight_m_wdecomp.weight` (O, 1)."""

from __future__ import annotations

import re

from torch import Tensor

from dora_mm.formats.tools import peft
from dora_mm.formats.tools.formulas import Update
from dora_mm.formats.tools.tool import Tool

MAGNITUDE = "weight_m_wdecomp.weight"


def dora(update: Update, m: Tensor, strength: float) -> Tensor:
    return peft.dora(update, m, 1.0)  # it has no strength


TOOL = Tool(
    names=peft.NAMES,
    parts={"lora_A.weight": "A", "lora_B.weight": "B", MAGNITUDE: "m"},
    dora=dora,
    lora=lambda update, m, strength: peft.lora(update, m, 1.0),
    differs="computes what the paper does",
    axis="out",
    strengths=(),
    wrote_key=re.compile(rf".*\.{re.escape(MAGNITUDE)}$"),
    alpha=peft.alpha,
    settings=peft.settings,
    named=peft.named,
    refuses=peft.refuses,
)

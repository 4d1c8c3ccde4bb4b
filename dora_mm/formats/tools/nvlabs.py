"""The checkpoints of DoRA's authors (NVlabs/DoRA): PEFT's names, the magnitude as `.weight_m_wdecomp.weight` (O, 1)."""

from __future__ import annotations

import re

from torch import Tensor

from dora_mm.formats.tools import peft
from dora_mm.formats.tools.formulas import Computation, Update
from dora_mm.formats.tools.tool import HeaderReader, Tool

MAGNITUDE = "weight_m_wdecomp.weight"


def dora(update: Update, m: Tensor, strength: float) -> Tensor:
    return peft.dora(update, m, 1.0)  # it has no strength


def lora(update: Update, m: Tensor | None, strength: float) -> Tensor:
    return peft.lora(update, m, 1.0)


TOOL = Tool(
    names=peft.NAMES,
    parts={"lora_A.weight": "A", "lora_B.weight": "B", MAGNITUDE: "m"},
    computes=Computation(dora, "computes what the paper does", axis="out", lora=lora, strengths=()),
    wrote_key=re.compile(rf".*\.{re.escape(MAGNITUDE)}$"),
    in_header=HeaderReader(peft.alpha, peft.settings),
    named=peft.named,
    refuses=peft.refuses,
)

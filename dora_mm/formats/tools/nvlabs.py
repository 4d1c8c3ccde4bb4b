"""The checkpoints of DoRA's authors (NVlabs/DoRA): PEFT's names, the magnitude as `.weight_m_wdecomp.weight` (O, 1)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dora_mm.formats.tools import peft
from dora_mm.formats.tools.parts import Parts
from dora_mm.formats.tools.tool import Header, Tool

MAGNITUDE = "weight_m_wdecomp.weight"


def matches(keys: Collection[str], header: Header) -> bool:
    return any(key.endswith(f".{MAGNITUDE}") for key in keys)


def apply(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    return peft.apply(parts, W0, 1.0)  # it has no strength


TOOL = Tool(
    names=peft.NAMES,
    parts={"lora_A.weight": "A", "lora_B.weight": "B", MAGNITUDE: "m"},
    apply=apply,
    differs="computes what the paper does",
    axis="out",
    strengths=(),
    matches=matches,
    alpha=peft.alpha,
    settings=peft.settings,
    named=peft.named,
)

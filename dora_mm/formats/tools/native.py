"""dora_mm's own file, trained_weights.safetensors: see formats/native.py. Alpha is in the header."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.exact import new_weight
from dora_mm.formats.json_text import parse_json
from dora_mm.formats.native import FORMAT_KEY, SPECS_KEY
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.parts import Parts, neutral
from dora_mm.formats.tools.tool import Header, Tool


def matches(keys: Collection[str], header: Header) -> bool:
    return FORMAT_KEY in header


def alpha(header: Header, module: str, rank: int) -> float | None:
    component, _, path = module.partition(".")
    specs = _specs(header.get(SPECS_KEY, "{}")).get(component)
    spec = specs.get(path) if isinstance(specs, dict) else None
    return spec.get("alpha") if isinstance(spec, dict) else None


@functools.lru_cache(maxsize=2)
def _specs(text: str) -> dict[str, Any]:
    return parse_json(text, SPECS_KEY)


def read(parts: Parts, axis: str | None) -> LayerState:
    if "weight" in parts:
        return LayerState(DoRASpec(method="full"), {"weight": parts["weight"]})
    if "A" not in parts and "m" in parts:
        return LayerState(DoRASpec(method="magnitude"), {"magnitude": parts["m"]})
    return neutral(parts, "out")


def apply(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    return new_weight(read(parts, None), W0, strength)


TOOL = Tool(
    title="dora_mm",
    names=re.compile(r"\w+\."),
    parts={"lora_A": "A", "lora_B": "B", "magnitude": "m", "weight": "weight"},
    apply=apply,
    differs="computes what the paper does",
    axis="out",
    matches=matches,
    read=read,
    alpha=alpha,
)

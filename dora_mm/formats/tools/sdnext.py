"""SD.Next: `.dora_scale` on both axes, but alpha / rank outside the norm: it scales the whole difference to W0."""

from __future__ import annotations

from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.tools.parts import (
    KOHYA_NAMES,
    KOHYA_PARTS,
    Parts,
    axis_of_shape,
    decomposed,
    linear,
    product,
    scaling,
    updated,
)
from dora_mm.formats.tools.tool import Tool


def apply(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    if "m" not in parts:
        return updated(parts, W0, strength)
    V = W0 + product(parts, W0)
    W = decomposed(parts["m"], V, norms(V, axis_of_shape(parts["m"], W0)))
    return linear(W0, W, strength * scaling(parts))


TOOL = Tool(
    names=KOHYA_NAMES,
    parts=KOHYA_PARTS,
    apply=apply,
    differs="applies alpha outside the norm",
)

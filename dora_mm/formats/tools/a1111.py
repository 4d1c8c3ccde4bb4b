"""AUTOMATIC1111's web UI since 1.10: `.dora_scale` scales input columns, whatever its shape: (O, 1) broadcasts."""

from __future__ import annotations

from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.tools.parts import LYCORIS_PARTS, OLD_KOHYA_NAMES, Parts, linear, product, scaling, updated
from dora_mm.formats.tools.tool import Tool


def apply(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    if "m" not in parts:
        return updated(parts, W0, strength)
    V = W0 + scaling(parts) * product(parts, W0)
    return linear(W0, V * (parts["m"].to(V.dtype) / norms(V, "in")), strength)


TOOL = Tool(
    names=OLD_KOHYA_NAMES,
    parts=LYCORIS_PARTS,
    apply=apply,
    differs="takes the norms of input columns",
    axis="in",
)

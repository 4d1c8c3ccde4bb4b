"""SD.Next: `.dora_scale` on both axes, by its shape.

Since July 2026 alpha / rank is inside the norm, as in the paper. Before, it scaled the whole difference to W0.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.tools.parts import (
    KOHYA_NAMES,
    LYCORIS_PARTS,
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
    """A magnitude of one dimension is of the rows only where it cannot be of the columns."""
    if "m" not in parts:
        return updated(parts, W0, strength)
    V, m = W0 + scaling(parts) * product(parts, W0), parts["m"].to(W0.dtype)
    rows = m.shape[0] == W0.shape[0] and (m.numel() == m.shape[0] if m.dim() > 1 else m.shape[0] != W0.shape[1])
    return linear(W0, V * (m / norms(V, "out" if rows else "in")), strength)


def apply_2025(parts: Parts, W0: Tensor, strength: float) -> Tensor:
    if "m" not in parts:
        return updated(parts, W0, strength)
    V = W0 + product(parts, W0)
    W = decomposed(parts["m"], V, norms(V, axis_of_shape(parts["m"], W0)))
    return linear(W0, W, strength * scaling(parts))


TOOL = Tool(
    names=KOHYA_NAMES,
    parts=LYCORIS_PARTS,
    apply=apply,
    differs="computes what the paper does",
)
TOOL_2025 = replace(TOOL, apply=apply_2025, differs="applies alpha outside the norm")

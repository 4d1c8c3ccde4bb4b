"""SD.Next: `.dora_scale` on both axes, by its shape.

Since July 2026 alpha / rank is inside the norm, as in the paper; before, it scaled the whole difference to W0.
"""

from __future__ import annotations

from torch import Tensor

from dora_mm.formats.tools.formulas import Computation, Update, linear
from dora_mm.formats.tools.parts import LYCORIS_PARTS
from dora_mm.formats.tools.tool import Tool


def dora(update: Update, m: Tensor, strength: float) -> Tensor:
    """A magnitude of one dimension is of the rows only where it cannot be of the columns."""
    W0 = update.W0
    rows = m.shape[0] == W0.shape[0] and (m.numel() == m.shape[0] if m.dim() > 1 else m.shape[0] != W0.shape[1])
    return linear(W0, update.scaled(m.to(W0.dtype) / update.norms("out" if rows else "in")), strength)


TOOL = Tool(
    parts={**LYCORIS_PARTS, "lora_A.weight": "A", "lora_B.weight": "B"},
    table="sdnext",
    computes=Computation(dora, "computes what the paper does"),
)

"""ai-toolkit: `.magnitude` (O,) and no alpha in the file; the norm is that of W0 + B A, s stays outside of it.

    W(t) = W0 + t s B A + (m / ||W0 + t B A|| - 1) (W0 + t B A)

Its training of transformers forces alpha = rank. That of SDXL does not, and the file does not say: s is 1 here, and an
`.alpha` that a person adds to the file is read.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from dora_mm.formats.algebra.exact import norms
from dora_mm.formats.naming.spellings import AI_TOOLKIT
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.formulas import Computation, Update
from dora_mm.formats.tools.parts import KOHYA_NAMES, Parts, kohya_tensors, neutral
from dora_mm.formats.tools.tool import Export, Holds, Tool


def read(parts: Parts, axis: str | None) -> LayerState:
    """With s = 1 the norm is the paper's."""
    state = neutral(parts, "out")
    return state if state.spec.scaling == 1 else replace(state, norm="unscaled")


def write(layer: LayerState, W0: Tensor) -> dict[str, Tensor]:
    tensors = kohya_tensors(layer)
    if tensors["lora_down.weight"].dim() > 2:
        raise ValueError("it is a convolution, for which ai-toolkit has no DoRA: use another target")
    del tensors["alpha"]
    if "dora_scale" in tensors:
        tensors["magnitude"] = tensors.pop("dora_scale").flatten()
    return tensors


def dora(update: Update, m: Tensor, strength: float) -> Tensor:
    V = update.plus(strength)
    g = m.to(V.dtype)[:, None] / norms(V, "out")
    return lora(update, m, strength) + (g - 1) * V


def lora(update: Update, m: Tensor | None, strength: float) -> Tensor:
    return update.W0 + update.scaling * (strength * update.BA())


TOOL = Tool(
    names=re.compile(rf"{KOHYA_NAMES.pattern}|transformer\.|diffusion_model\."),
    parts={
        "lora_down.weight": "A",
        "lora_up.weight": "B",
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "alpha": "alpha",
        "magnitude": "m",
    },
    computes=Computation(dora, "leaves alpha out of the norm", axis="out", lora=lora),
    wrote_key=re.compile(r"(?!base_model\.).*\.magnitude$"),
    read=read,
)
EXPORT = Export(
    write,
    AI_TOOLKIT,
    read_by=("ai-toolkit",),
    holds=Holds(columns=False, diffs=False, convolutions=False),
)

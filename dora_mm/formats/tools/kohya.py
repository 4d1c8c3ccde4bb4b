"""LyCORIS and kohya's sd-scripts: `lora_unet_<path>.lora_down.weight`, the magnitude as `.dora_scale`.

The magnitude is (O, 1[, 1, 1]), or (1, I[, 1, 1]) with `wd_on_output=False` and before LyCORIS 3.2. Alpha is inside the
norm. A strength scales the gain and not the update: t = 0 is W0 + s B A.
"""

from __future__ import annotations

import re

from torch import Tensor

from dora_mm.formats.naming.spellings import KOHYA
from dora_mm.formats.tools import products
from dora_mm.formats.tools.formulas import Computation, Update, over_updated
from dora_mm.formats.tools.parts import KOHYA_NAMES, LYCORIS_PARTS, kohya_tensors
from dora_mm.formats.tools.tool import Export, Holds, Tool


def dora(update: Update, m: Tensor, strength: float) -> Tensor:
    W = over_updated(update, m, 1.0)
    return W if strength == 1 else update.V + strength * (W - update.V)


TOOL = Tool(
    table="lycoris",
    parts={**LYCORIS_PARTS, **products.GLORA},
    computes=Computation(dora, "scales the magnitude alone by the strength"),
    wrote_key=re.compile(
        rf"{KOHYA_NAMES.pattern}.*\.(lora_down\.weight|diff|hada_w1_a|lokr_w\d(_a)?|a1\.weight|w_norm)$"
    ),
)
EXPORT = Export(kohya_tensors, KOHYA, read_by=("kohya", "sdnext"), holds=Holds(extras=True))

"""musubi-tuner: plain LoRA of kohya's form, and LoHa and LoKr of linear layers; `.dora_scale` is left out.

What it generates with is judged: Wan, Qwen-Image, Z-Image and Flux.2 add a file to the checkpoint's weights as they are
loaded; HunyuanVideo and Flux.1 Kontext build its network, which has only low ranks, and needs their alpha. FramePack is
no architecture here. With its option `--lycoris`, LyCORIS loads the file. Names that begin with `diffusion_model.` or
`transformer.` are read by its training alone (`--base_weights`), and rewritten by its `convert_lora.py`.
"""

from __future__ import annotations

from dora_mm.formats.tools import products
from dora_mm.formats.tools.formulas import Computation, added
from dora_mm.formats.tools.tool import Tool

_LOHA = {ending: role for ending, role in products.LOHA.items() if "_t" not in ending}
_LOKR = {ending: products.LOKR[ending] for ending in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")}
TOOL = Tool(
    table="musubi",
    parts={"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", **_LOHA, **_LOKR},
    computes=Computation(added, "adds what it reads to the weight"),
)

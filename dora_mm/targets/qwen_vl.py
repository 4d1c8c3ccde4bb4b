"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (transformers)."""

from dora_mm.targets.blocks import Block, compose
from dora_mm.targets.decoders import decoder

TEXT = decoder(r"model\.language_model\.")
VISION = Block(
    r"model\.visual\.blocks\.\d+",
    {
        "vision.attn": (r"attn\.(qkv|proj)", 2),
        "vision.mlp": (r"mlp\.(fc[12]|linear_fc[12]|(gate|up|down)_proj)", (2, 3)),
    },
)
MERGERS = r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"

QWEN2_VL = compose("qwen2-vl", TEXT, VISION, layers={"connector": r"model\.visual\.merger\.mlp\.[02]"})
QWEN3_VL = compose("qwen3-vl", TEXT, VISION, layers={"connector": MERGERS})

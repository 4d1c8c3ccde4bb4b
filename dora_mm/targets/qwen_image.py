"""Qwen-Image (diffusers). Nothing reads the text that its last block returns: layers of that get no gradient."""

from dora_mm.targets.blocks import Block, compose
from dora_mm.targets.flux import DEFAULT, JOINT

QWEN_IMAGE = compose(
    "qwen-image",
    Block(
        r"transformer_blocks\.\d+",
        {
            "attn": (rf"attn\.({JOINT})", 8),
            "ff": (r"(img|txt)_mlp\.net\.(0\.proj|2)", 4),
            "mod": (r"(img|txt)_mod\.1", 2),
        },
    ),
    default=DEFAULT,
)

"""Qwen-Image and Qwen-Image-2.1 (diffusers).

Nothing reads the text that the last block of Qwen-Image returns: layers of that get no gradient. In 2.1, one layer
computes the scales and gates of all blocks, `mod`; `text` brings the text to the width of the blocks.
"""

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
QWEN_IMAGE_21 = compose(
    "qwen-image-21",
    Block(
        r"transformer_blocks\.\d+",
        {"attn": (r"attn\.(to_[qkv]|to_out\.0)", 4), "ff": (r"img_mlp\.(proj|gate_layer|out)", 3)},
    ),
    default=DEFAULT,
    layers={"text": r"txt_in\.(in|out)_layer", "mod": r"modulation\.1"},
)

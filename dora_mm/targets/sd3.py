"""Stable Diffusion 3 and 3.5 (diffusers).

The last block returns no text: it lacks the layers for that, and the queries of its text get no gradient. The first
ones of 3.5-medium have a second attention.
"""

from dora_mm.targets.blocks import Block, compose
from dora_mm.targets.flux import DEFAULT, JOINT

SD3 = compose(
    "sd3",
    Block(
        r"transformer_blocks\.\d+",
        {
            "attn": (rf"attn\.({JOINT})|attn2\.(to_[qkv]|to_out\.0)", (7, 8, 11, 12)),
            "ff": (r"ff(_context)?\.net\.(0\.proj|2)", (2, 4)),
            "mod": (r"norm1(_context)?\.linear", 2),
        },
    ),
    default=DEFAULT,
)

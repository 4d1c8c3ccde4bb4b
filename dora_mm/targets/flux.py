"""Flux.1 and Flux.2 (diffusers).

`to_qkv_mlp_proj` of Flux.2 is attention and MLP in one layer, with one magnitude over all rows; it is in `attn`.
`mod` is what computes shifts, scales and gates from the time, per block in Flux.1, once for all blocks in Flux.2.
"""

from dora_mm.targets.blocks import Block, compose

JOINT = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"  # of images, and of the text
DEFAULT = ("attn", "ff")

FLUX = compose(
    "flux",
    Block(
        r"transformer_blocks\.\d+",
        {
            "attn": (rf"attn\.({JOINT})", 8),
            "ff": (r"ff(_context)?\.net\.(0\.proj|2)", 4),
            "mod": (r"norm1(_context)?\.linear", 2),
        },
    ),
    Block(
        r"single_transformer_blocks\.\d+",
        {"attn": (r"attn\.to_[qkv]", 3), "ff": ("proj_mlp|proj_out", 2), "mod": (r"norm\.linear", 1)},
    ),
    default=DEFAULT,
)
FLUX2 = compose(
    "flux2",
    Block(
        r"transformer_blocks\.\d+",
        {"attn": (rf"attn\.({JOINT})", 8), "ff": (r"ff(_context)?\.linear_(in|out)", 4)},
    ),
    Block(r"single_transformer_blocks\.\d+", {"attn": (r"attn\.(to_qkv_mlp_proj|to_out)", 2)}),
    default=DEFAULT,
    layers={"mod": r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"},
)

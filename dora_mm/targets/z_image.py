"""Z-Image (diffusers). Only the blocks that refine the text have no modulation."""

from dora_mm.targets.blocks import Block, compose
from dora_mm.targets.flux import DEFAULT

Z_IMAGE = compose(
    "z-image",
    Block(
        r"(layers|noise_refiner|context_refiner)\.\d+",
        {
            "attn": (r"attention\.(to_[qkv]|to_out\.0)", 4),
            "ff": (r"feed_forward\.w[123]", 3),
            "mod": (r"adaLN_modulation\.0", (0, 1)),
        },
    ),
    default=DEFAULT,
)

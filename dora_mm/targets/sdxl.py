"""The UNet of Stable Diffusion XL (diffusers' UNet2DConditionModel): 560 attention projections at full size.

`conv` excludes conv_in and conv_out, whose few channels make a low rank meaningless.
"""

from dora_mm.core.targets import TargetMap

UNET = TargetMap(
    "sdxl-unet",
    parts={
        "attn": (r"re:.*\.attn1\.to_[qkv]", r"re:.*\.attn1\.to_out\.0"),
        "cross": (r"re:.*\.attn2\.to_[qkv]", r"re:.*\.attn2\.to_out\.0"),
        "ff": (r"re:.*\.ff\.net\.0\.proj", r"re:.*\.ff\.net\.2"),
        "conv": (r"re:.*\.resnets\.\d+\.conv[12]", r"re:.*\.conv_shortcut", r"re:.*\.(down|up)samplers\.\d+\.conv"),
    },
    expect={
        "BasicTransformerBlock": {"attn": 4, "cross": 4, "ff": 2},
        "ResnetBlock2D": {"conv": (2, 3)},
        "Downsample2D": {"conv": 1},
        "Upsample2D": {"conv": 1},
    },
    default=("attn", "cross"),
)

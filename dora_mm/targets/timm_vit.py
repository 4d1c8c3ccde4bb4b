"""timm's plain vision transformers as the trunk of a VisionTower; open_clip builds its SigLIP towers of them.

`attn.qkv` is one layer of 3 E rows: row norms make it the same as three layers that share their A.
"""

from dora_mm.core.targets import TargetMap

VIT = TargetMap(
    "timm-vit",
    parts={
        "attn": (r"re:(.*\.)?trunk\.blocks\.\d+\.attn\.(qkv|proj)",),
        "ff": (r"re:(.*\.)?trunk\.blocks\.\d+\.mlp\.fc[12]",),
    },
    expect={"Block": {"attn": 2, "ff": 2}},
    default=("attn",),
)

"""timm's plain vision transformers as the trunk of a VisionTower; open_clip builds its SigLIP towers from them.

`attn.qkv` is one layer with 3 E rows: since norms are per row, it is the same as three layers that share their A.
"""

from dora_mm.core.targets import TargetMap

VIT = TargetMap(
    "timm-vit",
    parts={
        "vision.attn": (r"re:(.*\.)?trunk\.blocks\.\d+\.attn\.(qkv|proj)",),
        "vision.mlp": (r"re:(.*\.)?trunk\.blocks\.\d+\.mlp\.fc[12]",),
    },
    expect={"Block": {"vision.attn": 2, "vision.mlp": 2}},
    default=("vision.attn",),
)

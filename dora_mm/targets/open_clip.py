"""Vision transformers of open_clip as the trunk of a VisionTower.

nn.MultiheadAttention packs q, k and v into one weight: `attn.q_proj`, `k_proj` and `v_proj` are rows of it
(core/wrappers/attention.py).
"""

from dora_mm.core.targets import TargetMap

VISUAL = TargetMap(
    "open-clip-visual",
    parts={
        "vision.attn": (r"re:(.*\.)?trunk\.transformer\.resblocks\.\d+\.attn\.(q|k|v|out)_proj",),
        "vision.mlp": (r"re:(.*\.)?trunk\.transformer\.resblocks\.\d+\.mlp\.c_(fc|proj)",),
    },
    expect={"ResidualAttentionBlock": {"vision.attn": 4, "vision.mlp": 2}},
    default=("vision.attn",),
)

"""Vision transformers of open_clip as the trunk of a VisionTower.

nn.MultiheadAttention packs q, k and v into one weight: `attn.q_proj`, `k_proj` and `v_proj` are rows of it
(core/attention.py).
"""

from dora_mm.core.targets import TargetMap

VISUAL = TargetMap(
    "open-clip-visual",
    parts={
        "attn": (r"re:(.*\.)?trunk\.transformer\.resblocks\.\d+\.attn\.(q|k|v|out)_proj",),
        "ff": (r"re:(.*\.)?trunk\.transformer\.resblocks\.\d+\.mlp\.c_(fc|proj)",),
    },
    expect={"ResidualAttentionBlock": {"attn": 4, "ff": 2}},
    default=("attn",),
)

"""BART and VL-BART (transformers).

The paper's runs adapt q and v everywhere: its table says q and k, but its code and its number of parameters say q and
v.
"""

from dora_mm.core.targets import TargetMap

BART = TargetMap(
    "bart",
    parts={
        "text.qv": (r"re:(model\.)?(encoder|decoder)\.layers\.\d+\.self_attn\.(q|v)_proj",),
        "text.ko": (r"re:(model\.)?(encoder|decoder)\.layers\.\d+\.self_attn\.(k|out)_proj",),
        "text.mlp": (r"re:(model\.)?(encoder|decoder)\.layers\.\d+\.fc[12]",),
        "cross.qv": (r"re:(model\.)?decoder\.layers\.\d+\.encoder_attn\.(q|v)_proj",),
        "cross.ko": (r"re:(model\.)?decoder\.layers\.\d+\.encoder_attn\.(k|out)_proj",),
    },
    expect={
        "BartEncoderLayer": {"text.qv": 2, "text.ko": 2, "text.mlp": 2},
        "BartDecoderLayer": {"text.qv": 2, "text.ko": 2, "text.mlp": 2, "cross.qv": 2, "cross.ko": 2},
    },
    default=("text.qv", "cross.qv"),
)

"""CLIP's text encoders (transformers).

Since transformers 5, paths of CLIPTextModel do not begin with `text_model.`; those of CLIPTextModelWithProjection do.
"""

from dora_mm.core.targets import TargetMap

TEXT = TargetMap(
    "clip-text",
    parts={
        "attn": (r"re:(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",),
        "ff": (r"re:(text_model\.)?encoder\.layers\.\d+\.mlp\.fc[12]",),
    },
    expect={"CLIPEncoderLayer": {"attn": 4, "ff": 2}},
    default=("attn",),
)

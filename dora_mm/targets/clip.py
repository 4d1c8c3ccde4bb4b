"""CLIP's text encoders (transformers). CLIPTextModel has no `text_model.` in its paths since transformers 5,
CLIPTextModelWithProjection has."""

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

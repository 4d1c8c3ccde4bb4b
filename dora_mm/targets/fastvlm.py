"""FastVLM (transformers), whose tower is any model of timm.

`vision.attn` is the attention in the last stages of FastViT; `vision.mlp` its MLPs and the pointwise convolutions of
EfficientNets, which are MLPs over channels. Towers of other models have no such modules.
"""

from dora_mm.targets.blocks import compose
from dora_mm.targets.decoders import decoder
from dora_mm.targets.llava import PROJECTOR

TIMM = r"model\.vision_tower\.timm_model\.(stages\.\d+\.)?blocks(\.\d+)+\."
FASTVLM = compose(
    "fastvlm",
    decoder(r"model\.language_model\."),
    layers={
        "vision.attn": rf"{TIMM}token_mixer\.(qkv|proj)",
        "vision.mlp": rf"{TIMM}(mlp\.fc[12]|conv_pwl?)",
        "connector": PROJECTOR,
    },
)

"""Florence-2 (transformers): a BART behind a DaViT tower, whose blocks attend over windows and over channels."""

from dora_mm.targets.blocks import Block, bart, compose

VISION = Block(
    r"model\.vision_tower\.blocks\.\d+\.\d+",
    {
        "vision.attn": (r"(spatial_block\.window_attn|channel_block\.channel_attn)\.(qkv|proj)", 4),
        "vision.mlp": (r"(spatial|channel)_block\.ffn\.fc[12]", 4),
    },
)
FLORENCE2 = compose(
    "florence2",
    *bart(r"model\.language_model\."),
    VISION,
    layers={"connector": r"model\.multi_modal_projector\.image_projection"},
)

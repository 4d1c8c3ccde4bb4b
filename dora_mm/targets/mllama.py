"""Mllama, Llama 3.2 Vision (transformers): some blocks of the text attend to the image instead of the text.

Their gates are closed in a fresh model, and gradients of `cross` then zero.
"""

from dora_mm.targets.blocks import Block, compose

TEXT = Block(
    r"model\.language_model\.layers\.\d+",
    {
        "text.attn": (r"self_attn\.(q|k|v|o)_proj", (0, 4)),
        "text.mlp": (r"mlp\.(gate|up|down)_proj", 3),
        "cross": (r"cross_attn\.(q|k|v|o)_proj", (0, 4)),
    },
)
VISION = Block(
    r"model\.vision_model\.(global_)?transformer\.layers\.\d+",
    {"vision.attn": (r"self_attn\.(q|k|v|o)_proj", 4), "vision.mlp": (r"mlp\.fc[12]", 2)},
)
MLLAMA = compose("mllama", TEXT, VISION, layers={"connector": r"model\.multi_modal_projector"})

"""LLaVA and the classes of transformers that name their modules as it does; any decoder, CLIP, SigLIP or Pixtral tower.

LLaVA reads its tower before the last block (`vision_feature_layer` -2): adapters of that block get no gradient.
Gemma 3 projects images with a bare parameter, so it has no connector here.
"""

from dora_mm.targets.blocks import Block, clip_vision, compose, either
from dora_mm.targets.decoders import decoder

TEXT = decoder(r"model\.language_model\.")
CLIP = clip_vision(r"model\.vision_tower\.")
PIXTRAL = Block(
    r"model\.vision_tower\.transformer\.layers\.\d+",
    {
        "vision.attn": (r"attention\.(q|k|v|o)_proj", 4),
        "vision.mlp": (r"feed_forward\.(gate|up|down)_proj", 3),
    },
)
INTERNVL_VISION = Block(
    r"model\.vision_tower\.encoder\.layer\.\d+",
    {"vision.attn": (r"attention\.((q|k|v)_proj|projection_layer)", 4), "vision.mlp": (r"mlp\.fc[12]", 2)},
)
PROJECTOR = r"model\.multi_modal_projector\.linear_[12]"

LLAVA = compose("llava", TEXT, either(CLIP, PIXTRAL), layers={"connector": PROJECTOR})
PALIGEMMA = compose("paligemma", TEXT, CLIP, layers={"connector": r"model\.multi_modal_projector\.linear"})
GEMMA3 = compose("gemma3", TEXT, CLIP)
INTERNVL = compose("internvl", TEXT, INTERNVL_VISION, layers={"connector": PROJECTOR})

"""BLIP for captions and for questions, BLIP-2 and InstructBLIP (transformers).

BLIP's texts attend to the image (`cross`). The connector of BLIP-2 is its Q-Former with the projection behind it; its
language model is a decoder or a T5, whose own cross attention is `cross`.
"""

from dora_mm.targets.blocks import Block, bert, blip_vision, compose, either
from dora_mm.targets.decoders import WITH_HEAD, decoder
from dora_mm.targets.t5 import t5

BLIP = compose("blip", bert(r"(text_encoder|text_decoder\.bert)\.", cross=True), blip_vision(r"vision_model\."))

ATTENTION = r"(cross)?attention\.(attention\.(query|key|value)|output\.dense)"
QFORMER = Block(
    r"qformer\.encoder\.layer\.\d+",  # every other one has cross attention; two more layers read InstructBLIP's text
    {"connector": (rf"{ATTENTION}|(intermediate|output)(_query)?\.dense", (6, 8, 10, 12))},
)
BLIP2 = compose(
    "blip-2",
    either(decoder(rf"language_model\.{WITH_HEAD}"), t5(r"language_model\.")),
    blip_vision(r"vision_model\."),
    QFORMER,
    layers={"connector": "language_projection"},
)

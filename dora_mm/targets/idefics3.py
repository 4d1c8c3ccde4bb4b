"""Idefics3 and SmolVLM (transformers)."""

from dora_mm.targets.blocks import clip_vision, compose
from dora_mm.targets.decoders import decoder

IDEFICS3 = compose(
    "idefics3",
    decoder(r"model\.text_model\."),
    clip_vision(r"model\.vision_model\."),
    layers={"connector": r"model\.connector\.modality_projection\.proj"},
)

"""GIT (transformers): a BERT that reads the image as the first tokens of its text."""

from dora_mm.targets.blocks import bert, clip_vision, compose

GIT = compose(
    "git",
    bert(r"git\.", cross=False),
    clip_vision(r"git\.image_encoder\.vision_model\."),
    layers={"connector": r"git\.visual_projection\.visual_projection\.0"},
)

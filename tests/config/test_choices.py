"""Choices lie in configs as data, and are those of the registries below."""

from collections.abc import Iterable

from dora_mm.adapting.parts import full_name
from dora_mm.config.adapter import IMAGE_PARTS, VL_PARTS
from dora_mm.targets import MAPS

TRANSFORMERS = ("flux", "flux2", "sd3", "qwen-image", "z-image")
IMAGE_MODELS = {  # the target maps of the networks of image models
    "unet": ("sdxl-unet",),
    "transformer": TRANSFORMERS,
    "text_encoder": ("clip-text",),
    "text_encoder_2": ("clip-text",),
}


def parts_of(names: Iterable[str], component: str) -> set[str]:
    return {full_name(component, part) for name in names for part in MAPS[name].parts}


def test_parts_are_those_of_the_target_maps():
    images = {part for component, names in IMAGE_MODELS.items() for part in parts_of(names, component)}
    assert set(IMAGE_PARTS) == images
    others = set(MAPS) - {name for names in IMAGE_MODELS.values() for name in names}
    assert set(VL_PARTS) == parts_of(others, "model")

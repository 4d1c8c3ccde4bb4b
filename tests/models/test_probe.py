"""The small input by which a merged model is compared with the adapted one."""

import pytest

from dora_mm.models.probe import load_probe
from tests.shared.vl import tiny_vlm as tiny


@pytest.mark.parametrize(("kind", "tiles"), [("smolvlm", 1), ("internvl", 1), ("qwen2_vl", 8)])
def test_its_image_is_one_tile(kind, tiles, tmp_path):
    """SmolVLM's processor enlarges any image to its largest size, and cuts it into 17 tiles of published models."""
    row = load_probe(str(tiny.build(kind, tmp_path / kind)), None, "float32").row
    pixels = row.inputs["pixel_values"]
    assert (pixels.shape[1] if kind == "smolvlm" else len(pixels)) == tiles  # of Qwen2-VL they are patches

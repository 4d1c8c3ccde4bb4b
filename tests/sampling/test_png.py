"""What a PNG file says about its image."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_mm.sampling.png import BaseModel, GenerationMetadata, UsedAdapter, parameters_text, read_metadata


def description(model, *adapters):
    return GenerationMetadata(
        BaseModel(model, None, None, "float32", "0" * 64, "1" * 64 if model.endswith(".safetensors") else None),
        tuple(UsedAdapter(path, 1.0, "1" * 64, "1" * 12) for path in adapters),
        {"steps": 1, "guidance": 5.0, "width": 64, "height": 64, "scheduler": None},
        (("a bus", None, 0),),
        0,
        {},
        {"dora_mm": "1"},
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0"),
        ("models/sdxl_v1.5.safetensors", "sdxl_v1.5"),
    ],
)
def test_a_version_in_the_name_of_a_model_stays(path, name):
    assert f"Model: {name}," in parameters_text(description(path), "Euler")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/x/001", "x-001"),
        ("runs/x/001/adapter/pytorch_lora_weights.safetensors", "x-001"),
        ("loras/style-v1.5", "loras-style-v1.5"),
        (".", "adapter"),
        ("..", "adapter"),
        ("/", "adapter"),
    ],
)
def test_every_path_of_an_adapter_has_a_name(path, name):
    assert f'Lora hashes: "{name}: 111111111111"' in parameters_text(description("m", path), "Euler")


def test_weights_are_compared_by_their_digests():
    one, other = description("a", "runs/x"), description("/work/a", "/work/runs/x")
    assert one.is_same_image_as(other)
    assert not one.is_same_image_as(description("a"))


@pytest.mark.parametrize("text", ["[]", "1", "{}", '{"version": 1}', "no JSON"])
def test_a_text_chunk_that_is_no_description_is_refused(tmp_path, text):
    information = PngInfo()
    information.add_itxt("dora_mm", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=information)
    with pytest.raises(ValueError, match="cannot be read"):
        read_metadata(tmp_path / "a.png")

"""The names of weight files of variants, as diffusers and transformers write them."""

import pytest

from dora_mm.formats.files.variants import choose_variant, of_variant, variant_of

NAMES = {
    "model.safetensors": "",
    "diffusion_pytorch_model.safetensors": "",
    "model-00001-of-00002.safetensors": "",
    "model.safetensors.index.json": "",
    "model.fp16.safetensors": "fp16",
    "diffusion_pytorch_model.fp16-00001-of-00002.safetensors": "fp16",
    "diffusion_pytorch_model-00001-of-00002.bf16.safetensors": "bf16",
    "model.safetensors.index.fp16.json": "fp16",
    "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    "config.json": None,
    "model.fp16.bin": None,
}
PLAIN, HALF, BOTH = ["a.safetensors"], ["a.fp16.safetensors"], ["a.safetensors", "a.fp16.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_the_variant_of_a_file(name):
    assert variant_of(name) == NAMES[name]


@pytest.mark.parametrize(
    ("networks", "half", "chosen"),
    [
        ([BOTH, BOTH], False, ""),
        ([BOTH, BOTH], True, "fp16"),
        ([HALF, BOTH, ["tokenizer.json"]], False, "fp16"),
        ([PLAIN, HALF], False, "fp16"),
        ([PLAIN, PLAIN], True, ""),
        ([["a.bf16.safetensors", "a.fp16.safetensors"]], False, "fp16"),
        ([["a.non_ema.safetensors"]], True, "non_ema"),
        ([["config.json"], []], True, ""),
    ],
)
def test_the_variant_that_serves_all_networks(networks, half, chosen):
    assert choose_variant(networks, half=half) == chosen


def test_networks_without_a_variant_in_common():
    with pytest.raises(ValueError, match=r"different variants \(bf16, fp16\), and none serves all"):
        choose_variant([HALF, ["a.bf16.safetensors"]])


def test_a_network_without_the_variant_has_its_others():
    assert of_variant([*BOTH, "config.json"], "fp16") == ["a.fp16.safetensors", "config.json"]
    assert of_variant([*PLAIN, "config.json"], "fp16") == [*PLAIN, "config.json"]

"""What `convert` prints of its result."""

from pathlib import Path

import pytest

from dora_mm.formats.commands.conversion_text import conversion_text
from dora_mm.formats.commands.convert import Conversion

TEXT = ("model.text_model.layers.0.self_attn.q_proj", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
IMAGES = ("model.connector.modality_projection.proj", "model.visual.blocks.0.attn.qkv")


@pytest.mark.parametrize(("modules", "number"), [(TEXT + IMAGES, 2), (TEXT, 0)])
def test_modules_that_servers_ignore_are_counted(modules, number, tmp_path):
    text = conversion_text(Conversion((Path(tmp_path / "a.safetensors"),), modules), "lora")
    assert (f"{number} of these modules are outside of the language model" in text) == bool(number)
    assert ("dora-mm merge keeps them" in text) == bool(number)


@pytest.mark.parametrize(("ranks", "most"), [((3, 9, 16), 16), ((2, 4), 8), ((17,), 32)])
def test_a_lora_of_a_language_model_says_how_it_is_served(ranks, most):
    text = conversion_text(Conversion((Path("lora/adapter_model.safetensors"),), TEXT, ranks=ranks), "lora")
    served = f"vllm serve MODEL --enable-lora --max-lora-rank {most} --lora-modules mine=lora"
    assert f"serve    {served}, if vLLM supports this model" in text

"""Quantised base weights, where bitsandbytes and torchao are installed (make test-slow)."""

import pytest
import torch

from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.vlm_rows import write_images

PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "torchao_int8": "torchao"}
ROW = Example("1", ("wide.png",), "What colour is it?", ("red",), (1.0,))


def quantised(folder, name: str) -> VLM:
    pytest.importorskip(PACKAGES[name])
    return VLM(VLMModelConfig.model_validate({"path": str(folder), "quantization": name}))


def loss(vlm: VLM, batch) -> float:
    return float(vlm.loss(batch, torch.Generator()).mean.detach())


@pytest.mark.parametrize("name", PACKAGES)
def test_adapters_learn_on_quantised_weights(name, tiny_vlm, tmp_path):
    vlm = quantised(tiny_vlm("llava"), name)
    vlm.model.train()  # bitsandbytes evaluates 4-bit weights on a CPU in another layout, which these are too small for
    images = str(write_images(tmp_path))
    batch = vlm.batch("vqa", [ROW], images, [("red", 1.0)])
    before = loss(vlm, batch)
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": ["text.attn", "text.mlp"]})
    trained = adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    assert loss(vlm, batch) == pytest.approx(before, rel=1e-3)
    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=0.02)
    for _ in range(3):
        vlm.loss(batch, torch.Generator()).mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(vlm, batch) < before
    if name.endswith("4"):
        return
    assert len(vlm.answerer("vqa", DecodeConfig(max_new_tokens=3), ())([ROW], images)) == 1


def test_a_quantised_part_is_not_trained_itself(tiny_vlm):
    vlm = quantised(tiny_vlm("llava"), "nf4")
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": {"text.attn": {}, "text.mlp": {"method": "full"}}})
    with pytest.raises(ValueError, match="is quantised, and method full trains weights"):
        adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")

"""The shares of trained parameters in the paper's Table 1, of its recipes at full size on the meta device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_mm.adapting.networks import adapt
from dora_mm.config import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.targets import map_of
from tests.shared.vl.language_models import SHARES

SLOW = ("llama_13b", "llama2_7b")


@pytest.mark.parametrize("recipe", [r if r not in SLOW else pytest.param(r, marks=pytest.mark.slow) for r in SHARES])
def test_the_shares_of_table_1(recipe):
    sizes, expected = SHARES[recipe]
    found = []
    for overrides in (["adapter.method=lora"], [], ["adapter.rank=16", "adapter.alpha=32.0"]):
        config = load_config(f"configs/llm/{recipe}.yaml", overrides)
        assert isinstance(config, TrainVLConfig)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
        trained = adapt({"model": model}, {"model": map_of(model)}, config.adapter, seed=0, backend="torch")
        assert trained.reports["model"].num_modules == 5 * sizes["num_hidden_layers"]
        count = sum(parameter.numel() for parameter in trained.parameters.values())
        found.append(round(100 * count / sum(parameter.numel() for parameter in model.parameters()), 3))
    assert tuple(found) == expected

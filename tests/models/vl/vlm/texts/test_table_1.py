"""The shares of trained parameters in the paper's Table 1, of its recipes at full size on the meta device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_mm.adapting.networks import adapt
from dora_mm.config import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.targets import map_of

SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
THIRTEEN = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
EIGHT = SEVEN | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SHARES = {  # in percent: LoRA and DoRA at rank 32, and DoRA at rank 16
    "llama_7b": (SEVEN, (0.826, 0.838, 0.427)),
    "llama_13b": (THIRTEEN, (0.670, 0.681, 0.347)),
    "llama2_7b": (SEVEN, (0.826, 0.838, 0.427)),
    "llama3_8b": (EIGHT, (0.700, 0.710, 0.361)),  # the paper prints 0.35, without the magnitudes
}


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

"""Series and parallel adapters, the baselines of the paper's Table 1: what they compute, their shares, their files."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dora_mm.adapting.bottlenecks import attach, load
from dora_mm.adapting.networks import adapt
from dora_mm.config import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.targets import map_of
from tests.shared.vl.language_models import SEVEN, THIRTEEN

METHODS = ("series", "parallel")
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).requires_grad_(False).eval()


@pytest.mark.parametrize(("recipe", "sizes", "shares"), [("7b", SEVEN, (0.99, 3.54)), ("13b", THIRTEEN, (0.80, 2.89))])
def test_the_shares_of_table_1(recipe, sizes, shares):
    for method, share in zip(METHODS, shares, strict=True):
        overrides = [f"adapter.method={method}", "adapter.rank=256", "adapter.alpha=null", "adapter.dropout=0.0"]
        config = load_config(
            f"configs/llm/llama_{recipe}.yaml", [*overrides, "adapter.cache=weights", "adapter.parts={}"]
        )
        assert isinstance(config, TrainVLConfig)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
        trained = adapt({"model": model}, {"model": map_of(model)}, config.adapter, seed=0, backend="torch")
        assert round(100 * trained.num_trained / trained.num_all, 2) == share


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_one_changes_no_bit_and_a_trained_one_computes_the_formula(method):
    model, ids = tiny(), torch.arange(10)[None]
    expected = model(ids).logits
    parameters = attach(model, map_of(model), method, 3, seed=1)
    assert torch.equal(model(ids).logits, expected)
    other = tiny()
    assert torch.equal(
        next(iter(attach(other, map_of(other), method, 3, seed=1).values())), next(iter(parameters.values()))
    )
    for parameter in parameters.values():
        parameter.data.normal_()
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 5, 8)

    def beside(layer, x):
        return x @ layer.weight.T + torch.tanh(x @ layer.bottleneck.down.weight.T) @ layer.bottleneck.up.weight.T

    if method == "parallel":  # beside the layers of the published command: LLM-Adapters, math_running_commands
        gate = x @ mlp.gate_proj.weight.T
        reference = beside(mlp.down_proj, torch.nn.functional.silu(gate) * beside(mlp.up_proj, x))
        assert len(parameters) == 2 * 2 * 2
    else:
        h = (torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        reference = h + torch.tanh(h @ mlp.bottleneck.down.weight.T) @ mlp.bottleneck.up.weight.T
        assert len(parameters) == 2 * 2
    torch.testing.assert_close(mlp(x), reference)


def test_a_model_without_mlps_of_their_own_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, word_embed_proj_dim=8
        )
    )
    with pytest.raises(ValueError, match=r"fc1 is not a linear layer of an MLP of its own"):
        attach(model, map_of(model), "series", 2, seed=0)


def test_a_file_that_names_no_bottlenecks_is_refused(tmp_path):
    file = tmp_path / "trained_weights.safetensors"
    save_file({"model.layers.0.mlp.bottleneck.down.weight": torch.zeros(1, 1)}, file, {"dora_mm_bottleneck": "series"})
    with pytest.raises(ValueError, match="names no bottlenecks"):
        load(tiny(), map_of(tiny()), file)

"""The maps of decoder language models on a tiny model of every type: counts, what is left out, and gradients."""

import dataclasses
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, targets
from dora_mm.core.targets import match_modules
from dora_mm.registries.target_maps import MIXTURES
from dora_mm.targets.decoders import TABLE
from tests.shared import reference

LAYERS = 2
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "head_dim": 8,
    "rotary_dim": 4,
    "vocab_size": 64,
    "word_embed_proj_dim": 32,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MORE_SIZES = {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}}
INSIDE_VLMS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")  # see test_vlm_maps
CASES = {name: row for row in TABLE for name in row.types.split() if name not in INSIDE_VLMS}
HEADS = {"lm_head", "embed_out", "output_projection"}


def tiny(model_type: str):
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    config = kind(**{name: size for name, size in SIZES.items() if name in known} | MORE_SIZES.get(model_type, {}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def check_gradients(model):
    """Every adapted layer gets a gradient, and so is called."""
    for path in {name.rpartition(".")[0] for name in adapter_parameters(model)}:
        reference.randomize(model.get_submodule(path))
    logits = model(input_ids=torch.randint(2, 60, (2, 7)), use_cache=False).logits
    trained = adapter_parameters(model)
    gradients = torch.autograd.grad(logits.square().sum(), list(trained.values()), allow_unused=True)
    assert [n for n, g in zip(trained, gradients, strict=True) if g is None or not g.any()] == []


@pytest.mark.parametrize("model_type", CASES)
def test_every_decoder(model_type):
    row, model = CASES[model_type], tiny(model_type)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert targets.map_of(model) is targets.find("llm")
    report = dora_mm.inject(model, "llm", DoRASpec(rank=2))
    counts = Counter(module.part for module in report.modules)
    assert counts == {"text.attn": LAYERS * row.num_attention, "text.mlp": LAYERS * row.num_mlp}
    assert linears - {module.path for module in report.modules} <= HEADS
    check_gradients(model)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_of_experts(model_type):
    model = tiny(model_type)
    assert targets.map_of(model) is targets.find("llm-moe")
    report = dora_mm.inject(model, "llm-moe", DoRASpec(rank=2))
    assert Counter(module.part for module in report.modules) == {"text.attn": LAYERS * 4}
    check_gradients(model)
    dora_mm.remove(model)
    report = dora_mm.inject(model, "llm-moe", DoRASpec(rank=2), parts=["text.experts"])
    assert Counter(module.kind for module in report.modules) == {"DoRAExperts": LAYERS * 2}
    check_gradients(model)


def test_a_model_without_its_head_and_one_with_another():
    config = tiny("qwen3").config
    for kind in (transformers.Qwen3Model, transformers.Qwen3ForSequenceClassification):
        with torch.device("meta"):
            assert len(match_modules(kind(config), targets.map_of(config).select())) == 7 * LAYERS


def test_a_block_that_lacks_a_layer_is_refused():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.value, attention.v_proj = attention.v_proj, nn.Identity()
    with pytest.raises(ValueError, match=r"v_proj, a Identity, which cannot be adapted"):
        dora_mm.inject(model, "llm", DoRASpec())
    del attention.v_proj
    with pytest.raises(ValueError, match=r"expects 2 or 4 modules of part text.attn in each block") as error:
        dora_mm.inject(model, "llm", DoRASpec())
    assert "model.layers.1 has 3: " in str(error.value)
    assert str(error.value).endswith("nearest of the others: value")

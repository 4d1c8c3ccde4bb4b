"""Prefix tuning: what it computes is PEFT's, in training and in answers, and so are its files."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dora_mm.adapting.files import load_trained
from dora_mm.adapting.networks import adapt
from dora_mm.adapting.prefixes import attach, load, save
from dora_mm.config import load_config
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.models.vl.vlm.answers import VLMAnswers
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.targets import map_of
from tests.shared.data.text_rows import BALL, BOOL, BOXES
from tests.shared.vl.language_models import LANGUAGE_MODELS, SEVEN, THIRTEEN

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


@pytest.fixture
def open_model(tiny_vlm):
    return lambda name, **settings: VLM(VLMModelConfig(path=str(tiny_vlm(name)), **settings))


def prefixed(vlm, size=3, seed=1):
    config = VLAdapterConfig.model_validate({"method": "prefix", "rank": size})
    return adapt(vlm.networks, vlm.target_maps, config, seed=seed, backend="torch")


def learned(vlm):
    """A batch of two rows of different lengths."""
    return vlm.batch("chat", [BALL, BOXES], None, [("red", 1.0), ("two blue ones", 1.0)])


@pytest.mark.parametrize(("recipe", "sizes", "share"), [("7b", SEVEN, 0.117), ("13b", THIRTEEN, 0.094)])
def test_the_share_of_30_virtual_tokens(recipe, sizes, share):
    overrides = ["adapter.method=prefix", "adapter.rank=30", "adapter.alpha=null", "adapter.dropout=0.0"]
    overrides += ["adapter.cache=weights", "adapter.parts={}", "train.gradient_checkpointing=false"]
    config = load_config(f"configs/llm/llama_{recipe}.yaml", overrides)
    assert isinstance(config, TrainVLConfig)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
    trained = adapt({"model": model}, {"model": map_of(model)}, config.adapter, seed=0, backend="torch")
    assert round(100 * trained.num_trained / trained.num_all, 3) == share


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_loss_and_gradient_are_those_of_peft(name, open_model):
    vlm = open_model(name)
    ((inputs, labels, _),) = learned(vlm).groups
    other = peft.PeftModelForCausalLM(
        open_model(name).model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    (theirs,) = (parameter for parameter in other.parameters() if parameter.requires_grad)
    (ours,) = prefixed(vlm).parameters.values()
    assert torch.equal(next(iter(prefixed(open_model(name)).parameters.values())), ours)  # from the seed
    theirs.data.copy_(ours.data)
    other(**inputs, labels=labels.masked_fill(labels == IGNORED, -100)).loss.backward()
    loss = vlm.loss(learned(vlm), torch.Generator()).mean
    loss.backward()
    assert ours.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(parameter.grad is None for parameter in vlm.model.parameters() if parameter is not ours)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_answers_are_the_likeliest_tokens_and_do_not_depend_on_the_batch(name, open_model):
    vlm = open_model(name)
    prefixed(vlm)
    row = vlm.prompts.row("chat", BALL, None, None)
    ids = row.inputs["input_ids"]
    inputs, _ = vlm.prompts.collate([row])
    answer = vlm.network.generate(inputs, VLMAnswers(vlm.prompts, vlm.network).settings(5, 1))
    for token in answer[0]:
        assert int(vlm.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()) == int(token)
        ids = torch.cat([ids, token[None, None]], 1)
    for task, rows, settings in (
        ("chat", [BALL, BOXES], {"max_new_tokens": 5}),
        ("boolq", [BOOL, BOOL], {"max_new_tokens": 5, "beams": 2}),
        ("boolq", [BOOL], {"answers": "rank"}),
    ):
        ask = vlm.answerer(task, DecodeConfig(**settings), ())
        assert ask(rows, None) == [ask([row], None)[0] for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_trains_a_prefix_in_float32(dtype, open_model):
    vlm = open_model("llama", dtype=dtype)
    (ours,) = prefixed(vlm).parameters.values()
    with torch.autocast("cpu", torch.bfloat16):
        vlm.loss(learned(vlm), torch.Generator()).mean.backward()
    assert ours.dtype == ours.grad.dtype == torch.float32
    assert ours.grad.isfinite().all()
    assert ours.grad.any()


@torch.no_grad()
def test_peft_and_we_read_each_others_folders(open_model, tmp_path):
    vlm, other = open_model("qwen2"), open_model("qwen2")
    ids = torch.arange(5, 12)[None]
    peft_model = peft.PeftModelForCausalLM(
        other.model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    peft_model.save_pretrained(tmp_path / "theirs")
    load_trained(vlm, tmp_path / "theirs", backend="torch")
    torch.testing.assert_close(vlm.model(input_ids=ids).logits, peft_model(input_ids=ids).logits)
    save(vlm.model, "prefix", 3, {"base_model": "some"}, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(open_model("qwen2").model, tmp_path / "ours")
    assert torch.equal(again(input_ids=ids).logits, peft_model(input_ids=ids).logits)


@pytest.mark.parametrize("shape", [(0,), (3, 7), (3, 32, 1)])
def test_a_prefix_of_another_model_is_refused(shape, open_model, tmp_path):
    save_file({"prompt_embeddings": torch.zeros(shape)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    vlm = open_model("llama")
    with pytest.raises(ValueError, match=r"does not fit this model: its prefix is \("):
        load(vlm.model, vlm.target_maps["model"], tmp_path)


def test_other_prompts_of_peft_are_named(open_model, tmp_path):
    save_file({"prompt_embeddings": torch.zeros(3, 32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match=r"holds prompt tuning \(a learned prompt\), not LoRA or DoRA"):
        load_trained(open_model("llama"), tmp_path, backend="torch")


def test_rows_and_prefix_have_to_fit_the_positions(open_model):
    vlm = open_model("gpt2")
    prefixed(vlm, size=1023)
    with pytest.raises(ValueError, match=r"does not fit behind the 1023 of adapter\.method prefix, .* 1024 positions"):
        vlm.loss(learned(vlm), torch.Generator())


@pytest.mark.parametrize("name", ["florence2", "qwen2_vl"])
def test_models_that_read_images_are_refused(name, open_model):
    with pytest.raises(ValueError, match="prefix is for decoder language models"):
        prefixed(open_model(name))


def test_layers_without_keys_and_values_of_all_tokens_are_refused():
    sliding = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=4))
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL,
            num_key_value_heads=2,
            first_k_dense_replace=2,
            q_lora_rank=4,
            kv_lora_rank=4,
            qk_rope_head_dim=2,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    )
    for model in (sliding, latent):
        with pytest.raises(ValueError, match=r"not every layer of \w+ForCausalLM keeps keys and values of all tokens"):
            attach(model.requires_grad_(False), map_of(model), "prefix", 3, seed=0)

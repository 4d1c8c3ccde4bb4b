"""Adapters of PEFT with whole modules (`modules_to_save`) on models that tie the head to the embedding."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dora_mm import load_adapter
from tests.shared import reference

IDS = torch.arange(10)[None]


def base(kind):
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=16, **tokens)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=24,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def trained(folder, kind, targets, saved=None):
    """The logits of an adapter that PEFT trained and saved."""
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(base(kind), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(base(kind), str(folder)))


@pytest.mark.parametrize(
    ("kind", "targets", "saved"),
    [
        ("gpt2", ["c_attn"], ["wte"]),
        ("llama", ["q_proj"], ["embed_tokens"]),
        ("llama", ["q_proj"], ["lm_head"]),
        ("llama", ["q_proj"], ["lm_head", "embed_tokens"]),
        ("llama", ["q_proj", "lm_head"], None),  # PEFT saves the base of an adapted head, too
        ("llama", ["q_proj", "embed_tokens"], None),
    ],
)
def test_we_compute_what_peft_does(kind, targets, saved, tmp_path):
    wanted = trained(tmp_path, kind, targets, saved)
    model = base(kind)
    before = logits(model)
    load_adapter(model, tmp_path)
    assert reference.relative_error(logits(model), wanted) < 1e-6
    assert reference.relative_error(before, wanted) > 1e-2
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (saved is None)


def test_two_values_for_one_weight_are_refused_and_change_nothing(tmp_path):
    """PEFT writes both into the one weight, and the last one stays."""
    trained(tmp_path, "llama", ["q_proj", "lm_head"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors["base_model.model.lm_head.base_layer.weight"]
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": head + 1}, file)
    model = base("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight, which share one weight"):
        load_adapter(model, tmp_path)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())

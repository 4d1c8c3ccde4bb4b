"""Tiny decoder language models, with and without a chat template."""

from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.shared.vl import templates, vocabularies
from tests.shared.vl.sizes import text_config


def llama() -> tuple[PreTrainedModel, Any]:
    """As the first Llama and the second were published: without a chat template."""
    tokenizer = vocabularies.llama()
    return LlamaForCausalLM(LlamaConfig(**text_config(tokenizer, "llama"))), tokenizer


def qwen2() -> tuple[PreTrainedModel, Any]:
    tokenizer = vocabularies.qwen()
    tokenizer.chat_template = templates.TEXT
    return Qwen2ForCausalLM(Qwen2Config(**text_config(tokenizer, "qwen2"))), tokenizer


def gpt2() -> tuple[PreTrainedModel, Any]:
    tokenizer = vocabularies.gpt2(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    sizes = text_config(tokenizer, "gpt2")
    del sizes["num_key_value_heads"]  # which its class does not have
    return GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer


LANGUAGE_MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
THIRTEEN = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
EIGHT = SEVEN | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SHARES = {  # in percent: LoRA and DoRA at rank 32, and DoRA at rank 16
    "llama_7b": (SEVEN, (0.826, 0.838, 0.427)),
    "llama_13b": (THIRTEEN, (0.670, 0.681, 0.347)),
    "llama2_7b": (SEVEN, (0.826, 0.838, 0.427)),
    "llama3_8b": (EIGHT, (0.700, 0.710, 0.361)),  # the paper prints 0.35, without the magnitudes
}

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

from tests.models.vl.vlm import templates, vocabularies
from tests.models.vl.vlm.sizes import text_config


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

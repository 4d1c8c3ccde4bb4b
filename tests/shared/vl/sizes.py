"""The sizes that the tiny models share."""

from typing import Any

from transformers import PreTrainedTokenizerBase

SPREAD = {"initializer_range": 0.1}  # 0.02, made for layers of a thousand, would hide the image behind the rounding
LAYERS = SPREAD | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = LAYERS | {"num_key_value_heads": 1, "max_position_embeddings": 1024}


def square(side: int) -> dict[str, int]:
    """An image processor's size."""
    return {"height": side, "width": side}


def text_config(tokenizer: PreTrainedTokenizerBase, model_type: str, **others: Any) -> dict[str, Any]:
    """The config of a decoder for the tokens of a tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}
    return {"model_type": model_type} | TEXT | tokens | others


def tower(model_type: str, image_size: int = 28, patch_size: int = 14, **others: Any) -> dict[str, Any]:
    """The config of a vision transformer."""
    return {"model_type": model_type, "image_size": image_size, "patch_size": patch_size} | LAYERS | others

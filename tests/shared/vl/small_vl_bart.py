"""A VL-BART small enough to build in a moment, and its tokenizer."""

from functools import cache
from pathlib import Path

import torch
from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer

from dora_mm.models.vl.vl_bart.loading import from_bart, save_vl_bart
from dora_mm.models.vl.vl_bart.model import VLBart, VLInputs
from dora_mm.models.vl.vl_bart.text import encode_inputs
from samples.build.pretraining.tokenizer import train_tokenizer

TEXTS = [
    "is there a red cat left of the bus?",
    "two dogs and a red cat",
    "what color is the bus?",
    "yes",
    "no",
    "true false",
]
DIM = 8  # channels of visual features


@cache
def small_tokenizer() -> BartTokenizer:
    return train_tokenizer(TEXTS * 10, 100)


def small_bart(vocab_size: int | None = None, **changes) -> BartForConditionalGeneration:
    size = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    vocab_size = vocab_size or len(small_tokenizer()) - 200
    return BartForConditionalGeneration(
        BartConfig(vocab_size=vocab_size, init_std=0.3, **{**size, **heads, **changes})
    ).eval()


def small_vl_bart(visual: str = "image") -> VLBart:
    return from_bart(small_bart(), len(small_tokenizer()), DIM, visual).eval()


def small_inputs(texts: list[str], images: int = 1, side: int = 7) -> VLInputs:
    ids, mask = encode_inputs(small_tokenizer(), "vqa", texts, max_positions=1024)
    features = torch.randn(len(texts), images, side * side, DIM)
    visual_mask = torch.ones(len(texts), images * 36, dtype=torch.long)
    return VLInputs(ids, torch.cat([mask, visual_mask], dim=1), features)


def vl_bart(folder: Path, dim: int, vision: dict, questions: dict) -> dict:
    """The sections `model`, `vision` and `data` of a training of the small model, saved in a folder."""
    torch.manual_seed(0)
    save_vl_bart(from_bart(small_bart(), len(small_tokenizer()), dim, "image"), small_tokenizer(), folder / "model")
    model = {"family": "vl_bart", "path": str(folder / "model")}
    data = {"tasks": [{"task": "vqa", **{key: questions[key] for key in ("train", "valid")}}]}
    return {"model": model, "vision": vision, "data": data}

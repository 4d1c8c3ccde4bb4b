"""Load a VL-BART with its tokenizer: one that was saved, or a bare BART with the visual parts drawn from a seed."""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration, BartTokenizer
from transformers.utils import logging

from dora_mm.config.loader import resolve_model
from dora_mm.config.vl import VLModelConfig
from dora_mm.models.vl_bart import SENTINELS, VLBart, VLBartConfig
from dora_mm.models.vl_text import load_tokenizer

AutoConfig.register(VLBartConfig.model_type, VLBartConfig)

# facebook/bart-base, where it differs from the class's defaults: known without a network
BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
VISUAL: dict[str, dict[str, Any]] = {
    "image": {"pooled_side": 6, "max_images": 2},
    "video": {"pooled_side": None, "max_images": 2},
}
LOADING_ERRORS = (OSError, KeyError, ValueError, RuntimeError, SafetensorError)


def load_vl_bart(config: VLModelConfig, feature_dim: int, seed: int) -> tuple[VLBart, BartTokenizer]:
    """The model in float32, frozen, and its tokenizer.

    Of a bare BART the visual embedding and the sentinels' rows are drawn from `seed`: an adapter trained upon it is
    for this seed. `feature_dim` is the number of channels of the visual features.

    Raises:
        ValueError: nothing is there, or it is no BART, or made for other features.
    """
    path = resolve_model(config.path)
    found = config_of(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if isinstance(found, VLBartConfig):
            model = VLBart(found) if config.random else _loaded(VLBart, path)
        else:
            bart = found if config.random else _loaded(BartForConditionalGeneration, path)
            model = from_bart(bart, len(tokenizer), feature_dim, config.visual)
    check_features(model.config, feature_dim, path)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"model.path: {path} has {model.config.vocab_size} token rows and {len(tokenizer)} tokens")
    return model.requires_grad_(False), tokenizer


def empty_vl_bart(config: VLModelConfig, feature_dim: int) -> VLBart:
    """The frozen model that `load_vl_bart` would load, as its config alone says: for the meta device, to be counted."""
    found = config_of(resolve_model(config.path))
    if isinstance(found, VLBartConfig):
        return VLBart(found).requires_grad_(False)
    return from_bart(found, found.vocab_size + len(SENTINELS), feature_dim, config.visual).requires_grad_(False)


def check_features(config: VLBartConfig, feature_dim: int, path: str) -> None:
    if config.feature_dim != feature_dim:
        raise ValueError(
            f"model.path: {path} reads features of {config.feature_dim} channels, and vision gives {feature_dim}: "
            "set vision.tower and vision.layers to what it was trained with"
        )


def config_of(path: str) -> BartConfig:
    """The config of a BART or VL-BART; facebook/bart-base's is known."""
    if path == "facebook/bart-base":
        return BartConfig(**BART_BASE)
    try:
        found = AutoConfig.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise ValueError(f"model.path: {path} has no config of a BART: {' '.join(str(error).split())}") from error
    if not isinstance(found, BartConfig):
        raise ValueError(f"model.path: {path} is a {found.model_type}, and VL-BART is made from a BART")
    return found


def from_bart(
    bart: BartForConditionalGeneration | BartConfig, vocab_size: int, feature_dim: int, visual: str
) -> VLBart:
    """A VL-BART with this BART's weights (or of this size, all random); what it lacks is drawn by torch's generator."""
    base = bart if isinstance(bart, BartConfig) else bart.config
    same = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "vocab_size")}
    model = VLBart(VLBartConfig(**{**same, "vocab_size": vocab_size, "feature_dim": feature_dim, **VISUAL[visual]}))
    if not isinstance(bart, BartConfig):
        _copy_weights(bart, model)
    return model


@torch.no_grad()
def _copy_weights(bart: nn.Module, model: VLBart) -> None:
    """Token rows that BART lacks, and the visual embedding, keep what they were drawn as."""
    targets = dict(model.named_parameters())
    for name, parameter in bart.named_parameters():
        target = targets[name]
        rows = min(len(target), len(parameter)) if name == "model.shared.weight" else len(parameter)
        if target[:rows].shape != parameter[:rows].shape:
            raise ValueError(f"BART's {name} has shape {tuple(parameter.shape)} and should have {tuple(target.shape)}")
        target[:rows].copy_(parameter[:rows])


def _loaded(kind: Any, path: str) -> Any:
    try:
        with no_bars():
            model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except LOADING_ERRORS as error:
        raise ValueError(f"model.path: {path} cannot be loaded: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, report[what])):
            raise ValueError(
                f"model.path: {path} lacks weights ({what.replace('_', ' ')}: {found[0]}): it is incomplete"
            )
    return model


def save_vl_bart(model: VLBart, tokenizer: BartTokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A folder that `load_vl_bart` and transformers read."""
    copied: Any = copy.deepcopy(model)
    with no_bars():
        copied.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers shows a bar of its own for what takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

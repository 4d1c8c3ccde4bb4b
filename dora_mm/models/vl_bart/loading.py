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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration, BartTokenizer, GenerationConfig
from transformers.utils import logging

from dora_mm.config.loader import resolve_model
from dora_mm.config.vl import VLModelConfig
from dora_mm.models.vl_bart.model import SENTINELS, VLBart, VLBartConfig, special_tokens
from dora_mm.models.vl_bart.text import load_tokenizer

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
MIN_POSITIONS = 3  # <s>, a token, </s>
LOADING_ERRORS = (
    OSError,
    ArithmeticError,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
)


def load_vl_bart(config: VLModelConfig, feature_dim: int, seed: int) -> tuple[VLBart, BartTokenizer]:
    """The model in float32, frozen, and its tokenizer.

    Of a bare BART the visual embedding and the sentinels' rows are drawn from `seed`: an adapter trained upon it is
    for this seed. `feature_dim` is the number of channels of the visual features.

    Raises:
        ValueError: nothing is there, or it is no BART, or damaged, or made for other features.
    """
    path = resolve_model(config.path)
    base: Any = config_of(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if not config.random:
            base = _loaded(VLBart if isinstance(base, VLBartConfig) else BartForConditionalGeneration, path)
        model = _made(base, config, len(tokenizer), feature_dim, path)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"model.path: {path} has {model.config.vocab_size} token rows and {len(tokenizer)} tokens")
    # The folder's own would fill in whatever `answer_ids` leaves at its default.
    model.generation_config = GenerationConfig(**special_tokens(model.config))
    return model, tokenizer


def empty_vl_bart(config: VLModelConfig, feature_dim: int) -> VLBart:
    """The frozen model that `load_vl_bart` would load, as its config alone says: for the meta device, to be counted."""
    path = resolve_model(config.path)
    found = config_of(path)
    return _made(found, config, found.vocab_size + len(SENTINELS), feature_dim, path)


def _made(base: Any, config: VLModelConfig, vocab_size: int, feature_dim: int, path: str) -> VLBart:
    """The frozen model from a config or a model, of a BART or VL-BART; checked against what it is to be used for."""
    with as_value_error(path, "has a config.json that makes no model"):
        if isinstance(base, VLBartConfig):
            base = VLBart(base)
        elif not isinstance(base, VLBart):
            base = from_bart(base, vocab_size, feature_dim, config.visual or "image")
    check_visual(base.config, config.visual, path)
    check_features(base.config, feature_dim, path)
    return base.requires_grad_(False)


def check_visual(config: VLBartConfig, visual: str | None, path: str) -> None:
    kind = "video" if config.pooled_side is None else "image"
    if visual not in (None, kind):
        raise ValueError(
            f"model.path: {path} is a VL-BART of {kind} features, and model.visual is {visual}: leave model.visual out"
        )


def check_features(config: VLBartConfig, feature_dim: int, path: str) -> None:
    if config.feature_dim != feature_dim:
        raise ValueError(
            f"model.path: {path} reads features of {config.feature_dim} channels, and vision gives {feature_dim}: "
            "set vision (tower, layers or features) to what it was trained with"
        )


def config_of(path: str) -> BartConfig:
    """The config of a BART or VL-BART; facebook/bart-base's is known."""
    if path == "facebook/bart-base":
        return BartConfig(**BART_BASE)
    with as_value_error(path, "has no config of a BART"), silenced():
        found = AutoConfig.from_pretrained(path)
    if not isinstance(found, BartConfig):
        raise ValueError(f"model.path: {path} is a {found.model_type}, and VL-BART is made from a BART")
    if found.max_position_embeddings < MIN_POSITIONS:
        raise ValueError(
            f"model.path: {path} has positions for {found.max_position_embeddings} tokens, which is no text"
        )
    for name, value in special_tokens(found).items():
        if not isinstance(value, int) or not 0 <= value < found.vocab_size:
            raise ValueError(f"model.path: {path} has {name} {value} in its config.json, and {found.vocab_size} tokens")
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
    """A model with all its weights. Shapes that differ are let through, for transformers tells of them in 60 lines."""
    with as_value_error(path, "cannot be loaded"), silenced():
        settings = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = kind.from_pretrained(path, **settings)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model.path: {path} lacks weights ({missing[0]}): it is incomplete")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, needed = mismatched[0]
        raise ValueError(
            f"model.path: {path} has a {name} of shape {tuple(found)}, and its config.json needs {tuple(needed)}"
        )
    if surplus := sorted(name for name in report["unexpected_keys"] if "layers." in name):  # heads may be left behind
        raise ValueError(f"model.path: {path} has weights of layers that its config.json lacks ({surplus[0]})")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.isfinite().all():
            raise ValueError(f"model.path: {path} has numbers in {name} that are not finite: it is damaged")
    return model


@contextmanager
def as_value_error(path: str, what: str) -> Iterator[None]:
    """Whatever other libraries raise for a damaged folder, as one sentence."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise ValueError(f"model.path: {path} {what}: {' '.join(str(error).split())}") from error


def save_vl_bart(model: VLBart, tokenizer: BartTokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A folder that `load_vl_bart` and transformers read."""
    copied: Any = copy.deepcopy(model)
    with silenced():
        copied.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def silenced() -> Iterator[None]:
    """transformers shows a bar of its own for what takes a moment, and tables of what is told here in a sentence."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()

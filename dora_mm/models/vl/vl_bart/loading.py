"""Load a VL-BART with its tokenizer: a saved one, or a plain BART whose visual parts are drawn from a seed."""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration, BartTokenizer, GenerationConfig
from transformers.utils import logging

from dora_mm.config.models import VLBartModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.models.folders import load_weights, read_config
from dora_mm.models.opening import opening, without_bars
from dora_mm.models.vl.vl_bart.model import SENTINELS, VLBart, VLBartConfig, special_tokens
from dora_mm.models.vl.vl_bart.text import load_tokenizer

AutoConfig.register(VLBartConfig.model_type, VLBartConfig)

# facebook/bart-base, where it differs from the defaults of the class; written here so that no download is needed
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


def load_vl_bart(config: VLBartModelConfig, feature_dim: int, seed: int) -> tuple[VLBart, BartTokenizer]:
    """Loads a VL-BART, or turns a plain BART into one, with its tokenizer.

    For a plain BART, the visual embedding and the sentinels' rows are drawn from `seed`, so an adapter trained on such
    a model belongs to this seed.

    Args:
        config: The `model` section.
        feature_dim: Number of channels of the visual features.
        seed: Seed of the weights that the folder does not hold.

    Returns:
        The model (float32, frozen) and the tokenizer.

    Raises:
        ValueError: There is no model, it is not a BART, is damaged, or expects other features; the message names
            `model.path`.
    """
    path = resolve_model(config.path)
    base: Any = config_of(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if not config.random:
            base = _load_complete(VLBart if isinstance(base, VLBartConfig) else BartForConditionalGeneration, path)
        inherited = decoding_of(base)
        model = _build_checked(base, config, len(tokenizer), feature_dim, path)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"model.path: {path} has {model.config.vocab_size} token embeddings, but its tokenizer has "
            f"{len(tokenizer)} tokens"
        )
    # The folder's own generation config would override every setting that `answer_ids` leaves at its default.
    model.generation_config = GenerationConfig(**special_tokens(model.config), **inherited)
    return model, tokenizer


def decoding_of(base: Any) -> dict[str, Any]:
    """The generation settings that a VL-BART inherits from the model that it is loaded from.

    facebook/bart-base never writes three tokens in a row twice (`no_repeat_ngram_size` 3), and so neither did the
    models whose scores are published: their code inherits it. Beams and lengths are those of the task, there and here.

    Args:
        base: A BART or VL-BART, or the config alone, which has no such settings.
    """
    settings = getattr(base, "generation_config", None)
    size = settings.no_repeat_ngram_size if settings is not None else None
    return {"no_repeat_ngram_size": size} if size else {}


def empty_vl_bart(config: VLBartModelConfig, feature_dim: int) -> VLBart:
    """The model that `load_vl_bart` would load, frozen, from its config alone: to count parameters on the meta device.

    Args:
        config: The `model` section.
        feature_dim: Number of channels of the visual features.

    Raises:
        ValueError: There is no config, it is not a BART's, or it expects other features.
    """
    path = resolve_model(config.path)
    base = config_of(path)
    return _build_checked(base, config, base.vocab_size + len(SENTINELS), feature_dim, path)


def _build_checked(base: Any, config: VLBartModelConfig, vocab_size: int, feature_dim: int, path: str) -> VLBart:
    """The frozen VL-BART from a config or a model of BART or VL-BART; checked against `config` and `feature_dim`."""
    with opening(path, f"{path} has a config.json that no model can be built from", key="model.path", loads=False):
        if isinstance(base, VLBartConfig):
            base = VLBart(base)
        elif not isinstance(base, VLBart):
            base = from_bart(base, vocab_size, feature_dim, config.visual or "image")
    check_visual(base.config, config.visual, path)
    check_features(base.config, feature_dim, path)
    return base.requires_grad_(False).eval()  # as from_pretrained returns one; dropout would change answers


def check_visual(config: VLBartConfig, visual: str | None, path: str) -> None:
    """Raises a ValueError if a model for images is to be used for video features, or the other way round."""
    kind = "video" if config.pooled_side is None else "image"
    if visual not in (None, kind):
        raise ValueError(
            f"model.path: {path} is a VL-BART for {kind} features, and model.visual is {visual}: remove model.visual"
        )


def check_features(config: VLBartConfig, feature_dim: int, path: str) -> None:
    """Raises a ValueError if the model expects another number of feature channels."""
    if config.feature_dim != feature_dim:
        raise ValueError(
            f"model.path: {path} reads features of {config.feature_dim} channels, and vision gives {feature_dim}: "
            "set vision (tower, layers or features) as the model was trained"
        )


def config_of(path: str) -> BartConfig:
    """Reads the config of a BART or VL-BART; that of facebook/bart-base is built in.

    Args:
        path: A folder or a hub name.

    Raises:
        ValueError: There is no config, or it is not a BART's, or it has impossible values.
    """
    if path == "facebook/bart-base":
        return BartConfig(**BART_BASE)
    with silenced():
        config = read_config(path, key="model.path")
    if not isinstance(config, BartConfig):
        raise ValueError(f"model.path: {path} is a {config.model_type}, but VL-BART is built from a BART")
    if config.max_position_embeddings < MIN_POSITIONS:
        raise ValueError(
            f"model.path: {path} has positions for {config.max_position_embeddings} tokens, "
            f"and at least {MIN_POSITIONS} are needed"
        )
    for name, value in special_tokens(config).items():
        if not isinstance(value, int) or not 0 <= value < config.vocab_size:
            raise ValueError(
                f"model.path: {path} has {name} {value} in its config.json, but only {config.vocab_size} tokens"
            )
    return config


def from_bart(
    bart: BartForConditionalGeneration | BartConfig, vocab_size: int, feature_dim: int, visual: str
) -> VLBart:
    """Builds a VL-BART from a BART; what the BART lacks is drawn from torch's global generator.

    Args:
        bart: The model whose weights are copied, or a config, for a model of this size with random weights.
        vocab_size: Number of tokens, sentinels included.
        feature_dim: Number of channels of the visual features.
        visual: "image" or "video".

    Raises:
        ValueError: The shapes of the BART's weights do not fit its config.
    """
    base = bart if isinstance(bart, BartConfig) else bart.config
    shared = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "vocab_size")}
    model = VLBart(VLBartConfig(**{**shared, "vocab_size": vocab_size, "feature_dim": feature_dim, **VISUAL[visual]}))
    if not isinstance(bart, BartConfig):
        _copy_weights(bart, model)
    return model


@torch.no_grad()
def _copy_weights(bart: nn.Module, model: VLBart) -> None:
    """Copies a BART's weights; token rows that it lacks and the visual embedding keep their random values."""
    targets = dict(model.named_parameters())
    for name, parameter in bart.named_parameters():
        target = targets[name]
        rows = min(len(target), len(parameter)) if name == "model.shared.weight" else len(parameter)
        if target[:rows].shape != parameter[:rows].shape:
            raise ValueError(f"BART's {name} has shape {tuple(parameter.shape)} and should have {tuple(target.shape)}")
        target[:rows].copy_(parameter[:rows])


def _load_complete(kind: Any, path: str) -> Any:
    """Loads a model and checks that no weight is missing, surplus, of another shape or not finite."""
    with silenced():
        model, unused = load_weights(kind, path, dtype=torch.float32)
    if surplus := [name for name in unused if "layers." in name]:  # unused heads are fine
        raise ValueError(f"model.path: {path} has weights of layers that its config.json lacks ({surplus[0]})")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.isfinite().all():
            raise ValueError(f"model.path: {path} is damaged: {name} holds values that are not finite")
    return model


def save_vl_bart(model: VLBart, tokenizer: BartTokenizer, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves model and tokenizer to a folder that `load_vl_bart` and transformers read.

    Args:
        model: The model; it is not changed.
        tokenizer: Its tokenizer.
        folder: The folder to write to.
        dtype: The dtype of the saved weights.
    """
    copied: Any = copy.deepcopy(model)
    with silenced():
        copied.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def silenced() -> Iterator[None]:
    """Turns off transformers' progress bars and warnings: loading takes a moment, and errors are reported here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(level)

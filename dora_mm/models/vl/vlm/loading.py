"""Load any vision-language model or decoder language model of transformers, and what makes its inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, ProcessorMixin
from transformers.models.auto import modeling_auto as auto

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.paths import resolve_model
from dora_mm.models.folders import load_weights, model_class, read_config
from dora_mm.models.opening import opening
from dora_mm.models.quantization import config_for_transformers
from dora_mm.models.vl.vlm.image_limits import limited_grid, set_limits
from dora_mm.models.vl.vlm.texts import TextProcessor
from dora_mm.models.vl.vlm.videos import check_video_keys
from dora_mm.utils.guards import allow_kernels

MOST_TOKENS = 2**31
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")


def is_language_model(config: Any) -> bool:
    """Whether the config of a model names a decoder language model, which reads no images."""
    (name,) = (getattr(config, "architectures", None) or [""])[:1]
    reads_images = name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() or hasattr(config, "vision_config")
    return name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not reads_images


def load_processor(config: VLMModelConfig, model_config: Any = None) -> ProcessorMixin | TextProcessor:
    """Loads the processor of a model: its tokenizer and image processor; of a language model the tokenizer alone.

    Args:
        config: The `model` section.
        model_config: The model's own config, which says whether it reads images, and how large they may be.

    Raises:
        UnreachableError: It is on the hub, and the hub cannot be reached.
        ValueError: There is none, it takes no images or lacks a package, or an image size does not fit it.
    """
    path = resolve_model(config.path)
    if is_language_model(model_config):
        processor = TextProcessor(tokenizer := load_tokenizer(path, config.revision))
        if not tokenizer.is_fast:
            raise ValueError(
                f"model.path: {path} has a {type(tokenizer).__name__}, which tells no places of its tokens"
            )
        set_limits(processor, config, model_config)
        check_video_keys(processor, config)
        return processor
    with opening(path, f"the processor of {path} cannot be loaded", key="model.path", revision=config.revision):
        processor = AutoProcessor.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    images = getattr(processor, "image_processor", None)
    if images is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"model.path: {path} is neither a vision-language model, whose processor takes images and text, nor a "
            "decoder language model"
        )
    set_limits(processor, config, model_config)
    check_video_keys(processor, config)
    if type(processor).__name__ == "Cosmos3EdgeProcessor":  # which makes what its model needs only when asked
        processor.return_mm_token_type_ids = True
    return processor


def load_tokenizer(path: str, revision: str | None) -> Any:
    """Loads the tokenizer of a model.

    Raises:
        ValueError: There is none.
    """
    with opening(path, f"{path} has no tokenizer", revision=revision):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_vlm(config: VLMModelConfig, device: torch.device) -> Any:
    """Loads a model: frozen, in eval mode, in the configured dtype.

    Args:
        config: The `model` section.
        device: Where to put it. Weights are read straight to it, since quantised ones cannot move.

    Raises:
        ValueError: There is no model, it is damaged, incomplete or of another kind, or it needs a package; the message
            names the key.
    """
    path = resolve_model(config.path)
    kind = model_class(found := read_config(path, config.revision), path)
    dtype, quantized = getattr(torch, config.dtype), config.quantization
    quantization = config_for_transformers(quantized, dtype) if quantized else None
    allow_kernels(config.attn_implementation)
    settings = {"attn_implementation": config.attn_implementation, "quantization_config": quantization}
    model, _ = load_weights(
        kind,
        path,
        config=found,
        revision=config.revision,
        dtype=dtype,
        device_map={"": device},
        **{key: value for key, value in settings.items() if value is not None},
    )
    model.generation_config = special_tokens(model)
    if grid := limited_grid(model.config, config.max_tiles):
        model.config.image_grid_pinpoints = grid
    return completed(model).requires_grad_(False).eval()


def completed(model: Any) -> Any:
    """A model whose class runs, also that of Llama 4, which transformers 5.24 left incomplete.

    Its batch normalisations have the right gradients on a CPU, too.
    """
    if model.config.model_type == "llama4":
        model.language_model.register_forward_hook(_with_image_outputs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(_with_contiguous_gradient)
    return model


def _with_contiguous_gradient(module: Any, inputs: Any, output: Tensor) -> None:
    """Gives a batch normalisation of one image the gradient of its output with channels first.

    On a CPU, PyTorch 2.13 takes the gradient of one image whose channels lie last for one whose channels lie first: it
    looks at the stride between images, which has no meaning there. FastVLM's projector gives its tower such a gradient.
    """
    if output.requires_grad and len(output) == 1:
        output.register_hook(Tensor.contiguous)


def _with_image_outputs(module: Any, inputs: Any, output: Any) -> None:
    """Gives the output of Llama 4's text what transformers 5.24's class of text and images reads, which it lacks."""
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def special_tokens(model: Any) -> GenerationConfig:
    """A generation config with nothing but the model's special tokens.

    A model's own one has settings of its authors (sampling, penalties), which would apply to all that is not set.

    Raises:
        ValueError: A special token is no number, as in a config that is damaged.
    """
    own = copy.deepcopy(model.generation_config)
    found = {name: getattr(own, name, None) for name in SPECIAL_TOKENS}
    check_token_ids(found)
    return GenerationConfig(**found)


def check_token_ids(values: Mapping[str, Any]) -> None:
    """Checks the numbers of tokens in a config, and in the configs of its parts.

    Raises:
        ValueError: One is no number, or one that no vocabulary has.
    """
    for name, value in values.items():
        if str(name).endswith("_token_id") and value is not None:
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if any(type(one) is not int or abs(one) >= MOST_TOKENS for one in ids):
                raise ValueError(f"model.path: {name} in the configs of the model is no token's: {value!r:.100}")
        elif isinstance(value, Mapping):
            check_token_ids(value)

"""Prefix tuning, a baseline of the paper's Table 1: learned keys and values that stand in front of every row.

PEFT makes them, those of some virtual tokens in each layer (Li and Liang, arXiv 2101.00190), and its folder holds them.
Rows read them as a cache, and their own positions begin behind them, as in PEFT; unlike there, padding in front of a
row takes no positions, so that answers do not depend on the batch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_mm.core import TargetMap
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.formats.tools.peft import CONFIG_NAME, FILE_NAME
from dora_mm.utils.atomic import write_text
from dora_mm.utils.json_text import read_json
from dora_mm.utils.randomness import generator
from dora_mm.utils.tensor_writer import save_tensors

KEY, KIND = "prompt_embeddings", "PREFIX_TUNING"  # of PEFT: the one key of a file, and its `peft_type`
SETTINGS = (KEY,)  # of the header, that are computed with
NAME = "prefix"  # of the module, inside the model


def attach(network: nn.Module, targets: TargetMap, method: str, size: int, seed: int) -> dict[str, nn.Parameter]:
    """Puts a prefix in front of all that a model reads.

    Args:
        network: The model, which is changed.
        targets: Its target map.
        method: "prefix".
        size: Virtual tokens.
        seed: Of the first keys and values, which PEFT samples from N(0, 1); a fresh prefix changes what is read.

    Returns:
        The trained parameter (size, 2 * layers * key features) by its name.

    Raises:
        ValueError: The model is no decoder language model whose layers all keep the keys and values that PEFT makes.
    """
    from peft import PeftModelForCausalLM, PrefixTuningConfig  # here, since it takes seconds, and few trainings need it

    network = _checked(network)
    peft = PeftModelForCausalLM(network, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size))
    settings: Any = peft.active_peft_config
    _check_caches(network, settings)
    encoder: Any = peft.prompt_encoder["default"]
    weight = encoder.embedding.weight
    if not weight.is_meta:
        weight.data.copy_(torch.randn(weight.shape, generator=generator(seed, 0, NAME)))
    encoder.settings = settings
    network.add_module(NAME, encoder)
    network.register_forward_pre_hook(partial(_behind_prefix, peft), with_kwargs=True)
    return {f"{NAME}.embedding.weight": weight}


def _checked(network: Any) -> Any:
    """The model, if it is a decoder language model."""
    config: Any = getattr(network, "config", None)
    reads_text = hasattr(config, "get_text_config") and config.get_text_config() is config
    if not reads_text or config.is_encoder_decoder or hasattr(config, "vision_config"):
        raise ValueError(f"adapter.method prefix is for decoder language models, and {type(network).__name__} is none")
    return network


@torch.no_grad()
def _check_caches(network: Any, settings: Any) -> None:
    """Checks that every layer caches keys and values of all tokens, (B, heads, T, features) as PEFT makes them."""
    from transformers.cache_utils import DynamicLayer

    token = torch.zeros(1, 1, dtype=torch.long, device=next(network.parameters()).device)
    cache = getattr(network(input_ids=token, use_cache=True), "cache", None)
    layers: Any = getattr(cache, "layers", ())
    made = settings.num_attention_heads, settings.token_dim // settings.num_attention_heads

    def fits(layer: Any) -> bool:
        shapes = [getattr(kept, "shape", ()) for kept in (layer.keys, layer.values)]  # None: it shares another's
        return type(layer) is DynamicLayer and all(shape[1::2] == made for shape in shapes)

    if len(layers) != settings.num_layers or not all(map(fits, layers)):
        raise ValueError(
            f"adapter.method prefix: not every layer of {type(network).__name__} keeps keys and values of all tokens "
            f"in {made[0]} heads of {made[1]} features, as PEFT's prefix has them"
        )


def _behind_prefix(peft: Any, network: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs of a forward pass, behind the prefix; the cache of a further token of an answer has it already."""
    ids, mask, size = inputs["input_ids"], inputs.get("attention_mask"), peft.active_peft_config.num_virtual_tokens
    if inputs.get("cache") is None or not inputs["cache"].get_seq_length():
        inputs["cache"] = peft.get_prompt(len(ids))
    if mask is None:  # no padding
        mask = ids.new_ones(len(ids), inputs["cache"].get_seq_length() - size + ids.shape[1])
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit and size + mask.shape[1] > limit:
        raise ValueError(
            f"a row of {mask.shape[1]} tokens does not fit behind the {size} of adapter.method prefix, since the model "
            f"has {limit} positions"
        )
    if "position_ids" in inspect.signature(network.forward).parameters:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # without the padding in front
        inputs["position_ids"] = size + positions[:, -ids.shape[1] :]
    inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), size), mask], 1)
    return args, inputs


# --- files -----------------------------------------------------------------------------------------------------------


def save(network: nn.Module, method: str, size: int, about: Mapping[str, str], folder: Path) -> None:
    """Writes a prefix as PEFT's folder."""
    encoder: Any = network.get_submodule(NAME)
    base = {"base_model_name_or_path": about["base_model"], "inference_mode": True}
    write_text(folder / CONFIG_NAME, json.dumps(encoder.settings.to_dict() | base, indent=2, sort_keys=True) + "\n")
    save_tensors(folder / FILE_NAME, {KEY: encoder.embedding.weight}, about)


def header_in(path: Path) -> dict[str, str] | None:
    """The header of a prefix's file, of its folder or run directory, ours or PEFT's own; None: it is another adapter's.

    Raises:
        ValueError: There is no adapter, or its settings cannot be read.
    """
    file = find_file(path)
    opened, config = TensorFile(file), file.with_name(CONFIG_NAME)
    if set(opened.entries) != {KEY} or not config.is_file():
        return None
    return {KEY: KIND, **opened.metadata} if read_json(config).get("peft_type") == KIND else None


def load(network: nn.Module, targets: TargetMap, path: Path) -> None:
    """Puts the prefix of a file in front of all that a model reads.

    Raises:
        ValueError: The file is damaged, or does not fit the model.
    """
    file = find_file(path)
    opened = TensorFile(file)
    shape = tuple(opened.entries[KEY].shape)
    parameter = next(iter(attach(network, targets, NAME, shape[0] if shape else 0, 0).values()))
    if shape != tuple(parameter.shape):
        raise ValueError(f"{file} does not fit this model: its prefix is {shape}, not {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(opened.read(KEY))
    parameter.requires_grad_(False)

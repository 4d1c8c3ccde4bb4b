"""PEFT's own folder, which `PeftModel.from_pretrained` reads: `adapter_model.safetensors` and `adapter_config.json`.

    base_model.model.<path>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, as in peft_layers.py
    base_model.model.<name>     extra trainable parameters; PEFT loads them by their names, and those of an adapted
                                layer (its bias) are called `<path>.base_layer.<name>`

A folder holds the adapter of one model. It can be loaded into any component.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_mm.formats.json_text import json_header, read_json
from dora_mm.formats.peft_layers import (
    LAYER_KEY,
    OUR_METADATA,
    check_config,
    layer_state,
    lora_config,
    missing_names,
    our_config,
    tensor_name,
    to_file,
    why_not_held,
)
from dora_mm.formats.state import AdapterState, joined, layers_of
from dora_mm.formats.tensor_file import read_tensors
from dora_mm.utils.atomic import save_tensors, write_text

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
COMPONENT = "model"  # the name of the component where none is given
COMPONENTS = ()  # any, but only one

_KEY = re.compile(LAYER_KEY)


def why_not(components: Mapping[str, nn.Module]) -> str | None:
    """Why PEFT could not hold or compute the adapters of these models, or None: see `Format.why_not`."""
    if len(components) != 1:
        return f"PEFT's format holds the adapter of one model, and {', '.join(components)} were given"
    return why_not_held(*next(iter(components.items())))


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes adapter_model.safetensors and adapter_config.json: see `Format.save`."""
    component, model = next(iter(components.items()))
    layers = state.layers[component]
    adapted = layers_of(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= {PREFIX + joined(path, name): tensor for name, tensor in to_file(layer, adapted[path]).items()}
    extra = state.parameters.get(component, {})
    tensors |= {PREFIX + _file_name(name, layers): tensor for name, tensor in extra.items()}
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **lora_config(layers, model)}
    config |= {"base_model_name_or_path": metadata.get("base_model"), "revision": metadata.get("base_revision")}
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    header = {"format": "pt", OUR_METADATA: json.dumps({**our_config(layers), "parameters": sorted(extra)})}
    save_tensors(folder / FILE_NAME, tensors, {**metadata, **header})
    return folder / FILE_NAME


def _file_name(name: str, layers: Mapping[str, Any]) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in layers else name


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """Reads a folder of PEFT's: see `Format.read`.

    Args:
        path: The weights file; adapter_config.json is read from the same folder.
        components: The component of the result is the name of the only model here, else `COMPONENT`.

    Returns:
        The adapter, and the metadata of the weights file's header.

    Raises:
        ValueError: One of the two files is missing, damaged, incomplete or not of this format, or PEFT would compute
            something else from it (see `check_config`).
    """
    tensors, metadata = read_tensors(path)
    config = _read_config(path.with_name(CONFIG_NAME))
    check_config(path.with_name(CONFIG_NAME), config)
    ours = json_header(path, metadata, OUR_METADATA)
    component = next(iter(components)) if components and len(components) == 1 else COMPONENT
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{path} has the key {key}, which does not begin with {PREFIX}: it was not saved by PEFT")
        if match := _KEY.fullmatch(name := key.removeprefix(PREFIX)):
            grouped[match["path"] or ""][tensor_name(match["name"])] = tensor
        else:
            extra[name.replace(".base_layer.", ".")] = tensor
    _check_complete(path, grouped, extra, config, ours)
    layers = {name: layer_state(path, joined(component, name), found, config, ours) for name, found in grouped.items()}
    return AdapterState({component: layers}, {component: extra} if extra else {}), metadata


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing: PEFT's format is a folder of two files, {CONFIG_NAME} and {FILE_NAME}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA or DoRA adapter: its peft_type is not LORA")
    return config


def _check_complete(
    path: Path, layers: Mapping[str, Any], extra: Mapping[str, Any], config: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    if not layers:
        raise ValueError(f"{path} is not an adapter file: it has no lora_A and lora_B")
    if ours:  # the target_modules of others may be patterns
        missing = missing_names(config.get("target_modules") or [], layers)
        missing += missing_names(ours.get("parameters", []), extra)
        if missing:
            raise ValueError(f"{path} is incomplete: {missing[0]}, which was saved in it, is missing")

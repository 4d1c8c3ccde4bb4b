"""PEFT's own folder, which `PeftModel.from_pretrained` reads: `adapter_model.safetensors` and `adapter_config.json`.

    base_model.model.<path>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
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

from dora_mm.core.inject import adapted_layers
from dora_mm.core.layer import matrix_shape
from dora_mm.formats.peft_layers import (
    OUR_METADATA,
    check_can_hold,
    json_header,
    layer_state,
    lora_config,
    our_config,
    to_file,
)
from dora_mm.formats.state import AdapterState, read_tensors
from dora_mm.utils.atomic import save_tensors, write_text

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
COMPONENT = "model"  # the name of the component where none is given

_KEY = re.compile(r"(?P<path>.+)\.(?P<name>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")


def save(state: AdapterState, components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes adapter_model.safetensors and adapter_config.json: see `Format.save`.

    Raises:
        ValueError: There are several components, or PEFT cannot compute the adapter (see `check_can_hold`).
    """
    if len(components) != 1:
        raise ValueError(f"PEFT's format holds the adapter of one model, and {', '.join(components)} were given")
    component, model = next(iter(components.items()))
    layers = state.layers[component]
    check_can_hold(component, layers, model)
    adapted = adapted_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        shape = matrix_shape(adapted[path])
        assert shape is not None
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in to_file(layer, shape).items()}
    extra = state.parameters.get(component, {})
    tensors |= {PREFIX + _file_name(name, layers): tensor.detach() for name, tensor in extra.items()}
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **lora_config(layers)}
    config["base_model_name_or_path"] = metadata.get("base_model")
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
        ValueError: One of the two files is missing, damaged, incomplete or not of this format.
    """
    tensors, metadata = read_tensors(path)
    config = _read_config(path.with_name(CONFIG_NAME))
    ours = json_header(path, metadata, OUR_METADATA)
    component = next(iter(components)) if components and len(components) == 1 else COMPONENT
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{path} has the key {key}, which does not begin with {PREFIX}: it was not saved by PEFT")
        if match := _KEY.fullmatch(name := key.removeprefix(PREFIX)):
            grouped[match["path"]][match["name"].split(".")[0]] = tensor
        else:
            extra[name.replace(".base_layer.", ".")] = tensor
    _check_complete(path, grouped, extra, config, ours)
    layers = {name: layer_state(path, f"{component}.{name}", found, config, ours) for name, found in grouped.items()}
    return AdapterState({component: layers}, {component: extra} if extra else {}), metadata


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: PEFT's format is a folder of two files, {CONFIG_NAME} and {FILE_NAME}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA or DoRA adapter: its peft_type is not LORA")
    return config


def _check_complete(
    path: Path, layers: Mapping[str, Any], extra: Mapping[str, Any], config: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    if not layers:
        raise ValueError(f"{path} is not an adapter file: it has no lora_A and lora_B")
    if ours:  # the target_modules of others may be patterns
        missing = _missing(config.get("target_modules") or [], layers) + _missing(ours.get("parameters", []), extra)
        if missing:
            raise ValueError(f"{path} is incomplete: {missing[0]}, which was saved in it, is missing")


def _missing(names: Any, found: Mapping[str, Any]) -> list[Any]:
    """The names that are not in `found`; a value that is not a list counts as a missing name."""
    if not isinstance(names, list):
        return [names]
    return [name for name in names if not isinstance(name, str) or name not in found]

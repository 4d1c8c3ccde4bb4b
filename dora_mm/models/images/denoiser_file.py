"""A denoiser from a file of its own: flow models are passed around so, without text encoder and VAE, often in 8 bits.

In 8 bits a weight is `X.weight` in float8 and what it is multiplied by, a number or one for each row: `X.weight_scale`,
in older files of ComfyUI `X.scale_weight`. What such files say of inputs is for products in 8 bits, which are not taken
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules
from dora_mm.core.wrappers.float8 import STORED, Float8Linear
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.models.images.components import keeps_float32
from dora_mm.utils.json_text import parse_json

PREFIX = re.compile(r"^(model\.)?diffusion_model\.")  # before all keys of files that ComfyUI saved
SCALES = (".weight_scale", ".scale_weight")
OF_INPUTS = re.compile(r"\.(input_scale|scale_input|comfy_quant)$|^scaled_fp8$")
KNOWN = ("float8_e4m3fn", "float8_e5m2")  # forms of ComfyUI's quantised layers that are read
HEADER = "_quantization_metadata"  # where a header has these forms
FLOAT8 = (STORED, torch.float8_e5m2)
READ = {str(dtype) for dtype in (*FLOAT8, torch.float16, torch.bfloat16, torch.float32)}


def load_denoiser(kind: Any, config: Mapping[str, Any], path: Path, dtype: torch.dtype, kept: TargetMap | None) -> Any:
    """Builds a denoiser with the weights of a file, in its authors' names or those of diffusers.

    Args:
        kind: Its class of diffusers.
        config: Its config.
        path: The `.safetensors` file.
        dtype: Of its weights, but for those that the class keeps in float32; those in 8 bits are multiplied by their
            scales first.
        kept: The layers whose weights stay in 8 bits where they are; None: none do.

    Raises:
        ValueError: The file is damaged, in a form that is not read, or of another model.
    """
    file = TensorFile(path)
    _check_forms(file)
    with init_empty_weights():  # what is computed of the config alone is real
        network = kind.from_config(config)
    keys = {PREFIX.sub("", key): key for key in file.entries if not OF_INPUTS.search(key)}
    stored = {name: key for name, key in keys.items() if not name.endswith(SCALES)}
    scales = {name: scale for name, key in stored.items() if (scale := _scale(file, keys, name)) is not None}
    weights = _renamed(network, {name: file.map(key) for name, key in stored.items()})
    by_row = _renamed(network, scales)
    _check_names(network, weights)
    for layer in match_modules(network, kept.select(list(kept.parts))) if kept else ():
        name = f"{layer}.weight"
        if weights[name].dtype == STORED:
            linear: Any = network.get_submodule(layer)
            stored_linear = Float8Linear.stored(linear, weights.pop(name).clone(), by_row[name].clone())
            network.set_submodule(layer, stored_linear)
    dtypes = {name: torch.float32 if keeps_float32(kind, name) else dtype for name in weights}
    state = {name: _dense(tensor, by_row.get(name), dtypes[name]) for name, tensor in weights.items()}
    network.load_state_dict(state, strict=False, assign=True)
    return network


def _scale(file: TensorFile, keys: Mapping[str, str], name: str) -> Tensor | None:
    """The scales of the rows of a float8 tensor, float32, (O, 1) for a weight; None: it is not in float8."""
    entry = file.entries[keys[name]]
    if entry.dtype not in FLOAT8:
        return None
    own = next((keys[key] for end in SCALES if (key := name.removesuffix(".weight") + end) in keys), None)
    scale, ones = torch.ones(1) if own is None else file.read(own).float(), [1] * (len(entry.shape) - 1)
    if scale.numel() not in (1, entry.shape[0]):
        raise ValueError(f"{own} has neither one number nor one for each row")
    return scale.view(-1, *ones).expand(entry.shape[0], *ones)


def _dense(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight in new memory."""
    return tensor.to(dtype, copy=True) if scale is None else (tensor.float() * scale).to(dtype)


def _renamed(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of diffusers, whose own function takes stacked ones apart by rows."""
    if tensors.keys() <= network.state_dict().keys():
        return dict(tensors)
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES  # it takes a second to import

    rename = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    return rename(checkpoint=dict(tensors), config=network.config)


def _check_forms(file: TensorFile) -> None:
    """Raises ValueError where layers are quantised in another way than to float8."""
    layers = list(parse_json(file.metadata.get(HEADER, "{}"), HEADER).get("layers", {}).values())
    for key in file.entries:
        if key.endswith(".comfy_quant"):
            layers.append(parse_json(bytes(file.read(key).tolist()), key))
    forms = {str(layer.get("format")) for layer in layers if isinstance(layer, dict)} - set(KNOWN)
    forms |= {str(entry.dtype) for key, entry in file.entries.items() if key.endswith(".weight")} - READ
    if forms:
        found = ", ".join(sorted(forms))
        raise ValueError(f"it has weights as {found}, which are not read: use one in 16 bits, or in float8")


def _check_names(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    if missing := own.keys() - state.keys():
        raise ValueError(f"it is of another model and lacks {len(missing)} tensors, such as {min(missing)}")
    if unknown := state.keys() - own.keys():
        raise ValueError(f"it is of another model, which has {len(unknown)} other tensors, such as {min(unknown)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            found, wanted = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"it is of another model: {name} has the shape {found}, not {wanted}")

"""diffusers' LoRA file, `pytorch_lora_weights.safetensors`, which `StableDiffusionXLPipeline.load_lora_weights` reads.

    unet.<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
    unet.<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
    unet.<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)

and text_encoder.text_model.*, text_encoder_2.text_model.*, there with `lora_magnitude_vector.weight`. The header key
`lora_adapter_metadata` holds PEFT's configuration as JSON with the same prefixes: without it diffusers takes alpha =
rank. Methods `dora` and `lora` are what this format is made for; `magnitude` is written as DoRA of rank 1 with A = B =
0, which is the same function; `full` does not fit (see full.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import DoRASpec
from dora_mm.core.inject import adapted_layers
from dora_mm.core.layer import DoRAConv, Transposed, matrix_shape
from dora_mm.io.atomic import save_tensors
from dora_mm.io.state import AdapterState, LayerState, from_models, read_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_METADATA = "lora_adapter_metadata"
OUR_METADATA = "dora_mm"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TEXT_PREFIX = "text_model."  # other tools expect it; diffusers takes it off where transformers has dropped it

_KEY = re.compile(
    rf"(?P<component>{'|'.join(COMPONENTS)})\.(?P<path>.+)\."
    r"(?P<name>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(components: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Writes the adapters of {"unet": ..., "text_encoder": ..., ...} to folder/pytorch_lora_weights.safetensors.

    `metadata` goes into the header beside the keys that loaders need. The strength set at the moment is not saved.
    """
    unknown = [c for c in components if c not in COMPONENTS]
    if unknown:
        raise ValueError(f"the diffusers format has no component {unknown[0]!r}: it has {', '.join(COMPONENTS)}")
    taken = {PEFT_METADATA, OUR_METADATA, "format"} & metadata.keys()
    if taken:
        raise ValueError(f"the metadata key {min(taken)!r} is written by the format itself: choose another name")
    state = from_models(components)
    tensors: dict[str, Tensor] = {}
    peft: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for component, layers in state.items():
        _check_can_hold(component, layers, components[component])
        adapted = adapted_layers(components[component])
        for path, layer in layers.items():
            shape = matrix_shape(adapted[path])
            assert shape is not None
            for name, tensor in _to_file(layer, shape).items():
                tensors[_file_key(component, path, name)] = tensor
        peft.update({f"{component}.{key}": value for key, value in _peft_config(component, layers).items()})
        spec = next(iter(layers.values())).spec
        ours[component] = {"method": spec.method, "norm_grad": spec.norm_grad, "dropout": spec.dropout}
    header = {"format": "pt", PEFT_METADATA: json.dumps(peft, sort_keys=True), OUR_METADATA: json.dumps(ours)}
    save_tensors(folder / FILE_NAME, tensors, {**metadata, **header})
    return folder / FILE_NAME


def _check_can_hold(component: str, layers: Mapping[str, LayerState], model: nn.Module) -> None:
    methods = sorted({layer.spec.method for layer in layers.values()})
    if "full" in methods:
        raise ValueError(
            f"{component} was trained by method full, whose weights are no adapter: save it as format full"
        )
    if len(methods) > 1:
        raise ValueError(f"one file has one method per model, and {component} is adapted by {' and '.join(methods)}")
    for path in layers:
        module = model.get_submodule(path)
        if isinstance(module, Transposed):
            raise ValueError(
                f"{component}.{path} is a {type(module).__name__}, for which diffusers' format has no keys"
            )
        if isinstance(module, DoRAConv) and not _peft_computes(module):
            raise ValueError(
                f"{component}.{path} is a convolution with groups, dilation or a padding mode, which PEFT gets wrong: "
                "merge the adapter instead"
            )


def _peft_computes(conv: DoRAConv) -> bool:
    """PEFT 0.21 builds A without the base's dilation and padding mode, and splits B over groups."""
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def _to_file(layer: LayerState, weight_shape: tuple[int, ...]) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
    magnitude = tensors.get("magnitude")
    A = tensors.get("lora_A", torch.zeros(1, *weight_shape[1:]))
    B = tensors.get("lora_B", torch.zeros(weight_shape[0], 1))
    ones = (1,) * (len(weight_shape) - 2)  # in place of a convolution's kernel
    found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *ones)}
    if magnitude is not None:
        found["lora_magnitude_vector"] = magnitude.view(1, -1, *ones) if ones else magnitude
    return found


def _peft_config(component: str, layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """The arguments of peft.LoraConfig. Module names match as suffixes there, so they go without `text_model.`."""
    ranks = {_bare(component, path): _file_rank(layer.spec) for path, layer in layers.items()}
    alphas = {_bare(component, path): _file_alpha(layer.spec) for path, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    spec = next(iter(layers.values())).spec
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": list(ranks),
        "use_dora": spec.method != "lora",
        "lora_dropout": spec.dropout,
        "bias": "none",
    }


def _file_rank(spec: DoRASpec) -> int:
    return 1 if spec.method == "magnitude" else spec.rank


def _file_alpha(spec: DoRASpec) -> float | int:
    assert spec.alpha is not None
    alpha = 1 if spec.method == "magnitude" else spec.alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _bare(component: str, path: str) -> str:
    return path.removeprefix(TEXT_PREFIX) if component != "unet" else path


def _file_key(component: str, path: str, name: str) -> str:
    if component == "unet":
        return f"{component}.{path}.{name}"
    # transformers 5 drops a magnitude whose key has no `.weight`; PEFT, which reads the UNet's, takes either.
    ending = ".weight" if name == "lora_magnitude_vector" else ""
    return f"{component}.{TEXT_PREFIX}{_bare(component, path)}.{name}{ending}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, components: Mapping[str, nn.Module] | None = None) -> tuple[AdapterState, dict[str, str]]:
    """(state, header metadata) of a file. `components` tells how this version of transformers names text encoders'
    modules; without them the names are the file's."""
    tensors, metadata = read_tensors(path)
    grouped: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path} has the key {key}, which is not one of diffusers' LoRA format: convert it first")
        grouped[match["component"]][match["path"]][match["name"].split(".")[0]] = tensor
    if not grouped:
        raise ValueError(f"{path} holds no adapter: it has no tensors")
    peft, ours = (_json_header(path, metadata, key) for key in (PEFT_METADATA, OUR_METADATA))
    _check_complete(path, grouped, peft, ours)
    state: AdapterState = {}
    for component, layers in grouped.items():
        config = {k.removeprefix(f"{component}."): v for k, v in peft.items() if k.startswith(f"{component}.")}
        renamed = _names_of(components.get(component) if components else None)
        state[component] = {
            renamed(name): _layer_state(path, f"{component}.{name}", found, config, ours.get(component, {}))
            for name, found in layers.items()
        }
    return state, metadata


def _check_complete(
    path: Path, found: Mapping[str, Mapping[str, Any]], peft: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Every module that the header of a file of ours names must be there; others' headers may name patterns."""
    for component in ours:
        present = {_bare(component, name) for name in found.get(component, {})}
        for name in peft.get(f"{component}.target_modules", []):
            if name not in present:
                raise ValueError(f"{path} lacks {component}.{name}, which its header names: it is incomplete")


def _names_of(model: nn.Module | None):
    """How file paths become the model's: transformers 5 has dropped `text_model.` from one of the two encoders."""
    strip = model is not None and not hasattr(model, "text_model")
    return lambda name: name.removeprefix(TEXT_PREFIX) if strip else name


def _json_header(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a header key {key} that is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} has a header key {key} that is no JSON object")
    return value


def _layer_state(file: Path, name: str, found: dict[str, Tensor], config: dict[str, Any], ours: dict) -> LayerState:
    use_dora = config.get("use_dora", "lora_magnitude_vector" in found)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{file} lacks the key {name}.{missing[0]}: it is incomplete")
    if surplus := sorted(found.keys() - wanted):
        raise ValueError(f"{file} has the key {name}.{surplus[0]}, and its header says that it is plain LoRA")
    if flat := [key for key in ("lora_A", "lora_B") if found[key].dim() < 2]:
        raise ValueError(f"{file} has a {name}.{flat[0]} that is no matrix: it is damaged")
    tensors = {"lora_A": found["lora_A"], "lora_B": found["lora_B"].flatten(1)}
    if use_dora:
        tensors["magnitude"] = found["lora_magnitude_vector"].flatten()
    rank = found["lora_A"].shape[0]
    method = ours.get("method", "dora" if use_dora else "lora")
    if method == "magnitude":
        tensors = {"magnitude": tensors["magnitude"]}
    try:
        alpha = _alpha(config, name.partition(".")[2], rank)
        spec = DoRASpec(rank, alpha, ours.get("dropout", 0.0), method, ours.get("norm_grad", "detached"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has a header that makes no sense for {name}: {error}") from error
    return LayerState(spec, tensors)


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """PEFT's rules: the first key of `alpha_pattern` that matches the end of the path, else `lora_alpha`; under
    rank-stabilised LoRA the update is scaled by alpha / sqrt(rank). Without metadata alpha is the rank."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return alpha * rank**0.5 if config.get("use_rslora") else alpha

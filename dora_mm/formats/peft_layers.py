"""What diffusers' and PEFT's formats have in common: how a layer's tensors are named, and PEFT's LoraConfig.

<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import DoRASpec
from dora_mm.core.layer import DoRAConv, TransposedLayer
from dora_mm.formats.state import LayerState

OUR_METADATA = "dora_mm"


# --- writing ---------------------------------------------------------------------------------------------------------


def check_can_hold(component: str, layers: Mapping[str, LayerState], model: nn.Module) -> None:
    methods = sorted({layer.spec.method for layer in layers.values()})
    if "full" in methods:
        raise ValueError(
            f"{component} was trained by method full, whose weights are no adapter: save it as format full"
        )
    if len(methods) > 1:
        raise ValueError(f"one file has one method per model, and {component} is adapted by {' and '.join(methods)}")
    for path in layers:
        module = model.get_submodule(path)
        if isinstance(module, TransposedLayer):
            raise ValueError(f"{component}.{path} is a {type(module).__name__}, for which PEFT's formats have no keys")
        if isinstance(module, DoRAConv) and not _peft_computes(module):
            raise ValueError(
                f"{component}.{path} is a convolution with groups, dilation or a padding mode, which PEFT gets wrong: "
                "merge the adapter instead"
            )


def _peft_computes(conv: DoRAConv) -> bool:
    """PEFT 0.21 builds A without the base's dilation and padding mode, and splits B over groups."""
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def to_file(layer: LayerState, weight_shape: tuple[int, ...]) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
    magnitude = tensors.get("magnitude")
    A = tensors.get("lora_A", torch.zeros(1, *weight_shape[1:]))
    B = tensors.get("lora_B", torch.zeros(weight_shape[0], 1))
    ones = (1,) * (len(weight_shape) - 2)  # in place of a convolution's kernel
    found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *ones)}
    if magnitude is not None:
        found["lora_magnitude_vector"] = magnitude.view(1, -1, *ones) if ones else magnitude
    return found


def lora_config(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """The arguments of peft.LoraConfig for layers by the names that PEFT finds as suffixes of the model's."""
    ranks = {path: _file_rank(layer.spec) for path, layer in layers.items()}
    alphas = {path: _file_alpha(layer.spec) for path, layer in layers.items()}
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


def our_config(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """What PEFT's config does not hold."""
    spec = next(iter(layers.values())).spec
    return {"method": spec.method, "norm_grad": spec.norm_grad, "dropout": spec.dropout}


def _file_rank(spec: DoRASpec) -> int:
    return 1 if spec.method == "magnitude" else spec.rank


def _file_alpha(spec: DoRASpec) -> float | int:
    assert spec.alpha is not None
    alpha = 1 if spec.method == "magnitude" else spec.alpha
    return int(alpha) if alpha == int(alpha) else alpha


# --- reading ---------------------------------------------------------------------------------------------------------


def json_header(path: Path, metadata: Mapping[str, str], key: str, kind: type[dict | list] = dict) -> Any:
    """The JSON of a header key, of this kind; empty where there is no such key."""
    try:
        value = json.loads(metadata[key]) if key in metadata else kind()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a header key {key} that is no JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} has a header key {key} that is no JSON {'object' if kind is dict else 'list'}")
    return value


def layer_state(file: Path, name: str, found: dict[str, Tensor], config: dict[str, Any], ours: dict) -> LayerState:
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
    if method == "full" or bool(use_dora) == (method == "lora"):
        raise ValueError(f"{file} has a header that makes no sense for {name}: method {method}, use_dora {use_dora}")
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
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("its alpha_pattern is no JSON object")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise ValueError(f"its alpha_pattern {pattern!r} is no regular expression ({error})") from error
        if matches:
            alpha = value
            break
    return alpha * rank**0.5 if config.get("use_rslora") else alpha

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

from dora_mm.core.spec import DoRASpec
from dora_mm.core.layer import DoRAConv, TransposedLayer
from dora_mm.formats.state import LayerState

OUR_METADATA = "dora_mm"


# --- writing ---------------------------------------------------------------------------------------------------------


def check_can_hold(component: str, layers: Mapping[str, LayerState], model: nn.Module) -> None:
    """Checks that PEFT computes the same function from the file.

    Args:
        component: The name of the model, for messages.
        layers: The adapters of the model by module path.
        model: The adapted model.

    Raises:
        ValueError: A layer was trained with method `full`, layers differ in method, or a layer is of a kind that PEFT's
            formats have no keys for or that PEFT computes differently.
    """
    methods = sorted({layer.spec.method for layer in layers.values()})
    if "full" in methods:
        raise ValueError(
            f"{component} was trained by method full, whose weights are not an adapter: save it as format full"
        )
    if len(methods) > 1:
        raise ValueError(f"a file holds one method per model, but {component} is adapted with {' and '.join(methods)}")
    for path in layers:
        module = model.get_submodule(path)
        if isinstance(module, TransposedLayer):
            raise ValueError(f"{component}.{path} is a {type(module).__name__}, for which PEFT's formats have no keys")
        if isinstance(module, DoRAConv) and not _peft_computes(module):
            raise ValueError(
                f"{component}.{path} is a convolution with groups, dilation or a padding mode, which PEFT computes "
                "differently: merge the adapter instead"
            )


def _peft_computes(conv: DoRAConv) -> bool:
    """PEFT 0.21 builds A without the base's dilation and padding mode, and splits B over groups."""
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def to_file(layer: LayerState, weight_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of one layer in the file, as float32.

    Args:
        layer: The adapter of the layer; without A and B (method `magnitude`) zeros of rank 1 are written for them.
        weight_shape: The shape of the base weight as a matrix, (O, I), or of a convolution, (O, I, *K).

    Returns:
        By the end of the key: "lora_A.weight" (R, I) or (R, I, *K), "lora_B.weight" (O, R) or (O, R, 1, ...), and,
        except for method `lora`, "lora_magnitude_vector" (O,) or (1, O, 1, ...).
    """
    tensors = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
    magnitude = tensors.get("magnitude")
    A = tensors.get("lora_A", torch.zeros(1, *weight_shape[1:]))
    B = tensors.get("lora_B", torch.zeros(weight_shape[0], 1))
    ones = (1,) * (len(weight_shape) - 2)  # instead of the kernel size of a convolution
    found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *ones)}
    if magnitude is not None:
        found["lora_magnitude_vector"] = magnitude.view(1, -1, *ones) if ones else magnitude
    return found


def lora_config(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """The arguments of peft.LoraConfig.

    Args:
        layers: The adapters by module path; PEFT takes these paths as suffixes of the model's.
    """
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
    """The settings that PEFT's config does not have; they are in the header under the key `OUR_METADATA`."""
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
    """Reads a header entry that holds JSON.

    Args:
        path: The file, for messages.
        metadata: The metadata of the file's header.
        key: The key of the entry.
        kind: The type that the value must have.

    Returns:
        The value; an empty one where there is no such key.

    Raises:
        ValueError: The entry is not valid JSON, or of another type.
    """
    try:
        value = json.loads(metadata[key]) if key in metadata else kind()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a header key {key} that is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} has a header key {key} that is not a JSON {'object' if kind is dict else 'list'}")
    return value


def layer_state(file: Path, name: str, found: dict[str, Tensor], config: dict[str, Any], ours: dict) -> LayerState:
    """The adapter of one layer, from its tensors in the file.

    Args:
        file: The file, for messages.
        name: The component and the path of the layer, joined by a dot.
        found: The tensors of the layer by `lora_A`, `lora_B` and `lora_magnitude_vector`.
        config: PEFT's LoraConfig of the component; empty where the file has none.
        ours: The result of `our_config` when the file was written; empty for files of other tools.

    Raises:
        ValueError: A tensor is missing or is not a matrix, or the header contradicts the tensors or itself.
    """
    use_dora = config.get("use_dora", "lora_magnitude_vector" in found)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{file} is incomplete: the key {name}.{missing[0]} is missing")
    if surplus := sorted(found.keys() - wanted):
        raise ValueError(f"{file} has the key {name}.{surplus[0]}, but its header says that it is plain LoRA")
    if flat := [key for key in ("lora_A", "lora_B") if found[key].dim() < 2]:
        raise ValueError(f"{file} is damaged: its {name}.{flat[0]} is not a matrix")
    tensors = {"lora_A": found["lora_A"], "lora_B": found["lora_B"].flatten(1)}
    if use_dora:
        tensors["magnitude"] = found["lora_magnitude_vector"].flatten()
    rank = found["lora_A"].shape[0]
    method = ours.get("method", "dora" if use_dora else "lora")
    if method == "full" or bool(use_dora) == (method == "lora"):
        raise ValueError(f"{file} has a contradictory header for {name}: method {method}, use_dora {use_dora}")
    if method == "magnitude":
        tensors = {"magnitude": tensors["magnitude"]}
    try:
        alpha = _alpha(config, name.partition(".")[2], rank)
        spec = DoRASpec(rank, alpha, ours.get("dropout", 0.0), method, ours.get("norm_grad", "detached"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has an invalid header for {name}: {error}") from error
    return LayerState(spec, tensors)


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Alpha by PEFT's rules: the first key of `alpha_pattern` that matches the end of the path, else `lora_alpha`.

    With rank-stabilised LoRA the update is scaled by alpha / sqrt(rank). Without metadata alpha is the rank.
    """
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is not a JSON object")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise ValueError(f"the alpha_pattern {pattern!r} is not a regular expression: {error}") from error
        if matches:
            alpha = value
            break
    return alpha * rank**0.5 if config.get("use_rslora") else alpha

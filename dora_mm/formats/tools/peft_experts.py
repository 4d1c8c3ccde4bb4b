"""LoRA of stacked experts in PEFT's folders, as its `target_parameters` writes it.

    <experts>.lora_A.weight              (E R, I), one expert after the other
    <experts>.lora_B.weight              (O, R E), for each rank all experts
    <experts>.base_layer.lora_A.weight   the same of the parameter before: the last one of a module is the outermost

The names do not say which parameter is meant: that is the order of those of the module that `target_parameters` names.
PEFT takes a parameter for (E, O, I) where its module has no true `is_transposed`. Of a class that stores (E, I, O) and
does not say so, its A is B^T here, and its B is A^T.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dora_mm.core.wrappers.experts import ENDING, ExpertProjection
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import peft_config
from dora_mm.formats.tools.parts import Parts

ORDER = ("gate_up", "gate", "up", "down")  # of the parameters in the modules of transformers 5.24
INNER = ".base_layer"


def parameter_of(path: str) -> str:
    """The path of the parameter that a layer of experts adapts."""
    return f"{path}{ENDING}"


def in_file(paths: Iterable[str]) -> dict[str, str]:
    """The paths in a file of all layers of experts that it holds, by their paths in the model."""
    found = {}
    for experts, names in _by_module(paths).items():
        for depth, name in enumerate(reversed(names)):
            found[f"{experts}.{name}" if experts else name] = experts + depth * INNER
    return found


def in_model(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """The paths in the model of layers of experts, by their paths in a file.

    Args:
        config: PEFT's LoraConfig.
        paths: The paths of all adapted modules in the file.

    Raises:
        ValueError: A target parameter is none of stacked experts, or the file has another number of adapters in a
            module than the config has target parameters.
    """
    targets = _targets(config)
    names = {target.rpartition(".")[2] for target in targets}
    known = {name: parameter_of(name) for name in ORDER}
    if unknown := sorted(names - set(known.values())):
        raise ValueError(
            f"adapter_config.json has the setting target_parameters of PEFT with {unknown[0]!r:.100}, which is no "
            f"weight of stacked experts: only {', '.join(known.values())} of these are read; merge it with PEFT"
        )
    depths: dict[str, set[int]] = defaultdict(set)
    for path in paths:
        outer = path
        while outer.endswith(INNER):
            outer = outer.removesuffix(INNER)
        depths[outer].add((len(path) - len(outer)) // len(INNER))
    found = {}
    for outer, nested in depths.items():
        adapted = [name for name in ORDER if names_parameter(targets, f"{outer}.{known[name]}")]
        if not adapted:
            continue
        if nested != set(range(len(adapted))):
            raise ValueError(f"it has {len(nested)} adapters of {outer:.200}, and its target_parameters {len(adapted)}")
        found |= {outer + depth * INNER: f"{outer}.{name}" for depth, name in enumerate(reversed(adapted))}
    return found


def names_parameter(targets: set[str], parameter: str) -> bool:
    """Whether the targets have a parameter: by its path, or by the end of that."""
    parts = parameter.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


def is_experts(config: Mapping[str, Any], path: str) -> bool:
    """Whether a layer of a model is one of the experts that a config targets."""
    return bool(config.get("target_parameters")) and names_parameter(_targets(config), parameter_of(path))


def stacked(parts: Parts, rank: int) -> dict[str, Tensor]:
    """The tensors of a layer with A (E, R, I) and B (E, O, R), and `experts`, from those of a file."""
    A, B = parts["A"], parts["B"]
    num_experts, rest = divmod(A.shape[0], rank)
    if A.dim() != 2 or B.dim() != 2 or rest or B.shape[1] != A.shape[0]:
        shapes = f"{tuple(A.shape)} of A and {tuple(B.shape)} of B"
        raise ValueError(f"the shapes {shapes} do not fit each other, as those of stacked experts of rank {rank}")
    stacked_A = A.reshape(num_experts, rank, A.shape[1])
    return {**parts, "A": stacked_A, "B": B.reshape(len(B), rank, num_experts).permute(2, 0, 1)}


def flat(layer: LayerState) -> dict[str, Tensor]:
    """The A and B of a layer as a file has them."""
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    return {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}


def oriented(layer: LayerState, module: nn.Module | None) -> LayerState:
    """A layer as PEFT takes it for the rows and columns of its parameter; and back.

    Args:
        layer: The adapter.
        module: The layer in the model; others than those of experts, and None, change nothing.
    """
    if not isinstance(module, ExpertProjection) or "lora_A" not in layer.tensors:
        return layer
    if module.transposed == bool(getattr(module.holder[0], "is_transposed", False)):
        return layer
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    return replace(layer, tensors={"lora_A": B.mT, "lora_B": A.mT})


def _by_module(paths: Iterable[str]) -> dict[str, list[str]]:
    """The names of the adapted parameters of each module, without the ending, in the order of the module."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        experts, _, name = path.rpartition(".")
        found[experts].append(name)
    return {experts: sorted(names, key=ORDER.index) for experts, names in found.items()}


def _targets(config: Mapping[str, Any]) -> set[str]:
    return set(peft_config.listed_names(config.get("target_parameters") or []))

"""PEFT's LoraConfig, which its own folders and diffusers' files have, and what PEFT would compute otherwise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.layer import DoRAConv
from dora_mm.core.spec import DoRASpec, finite_number
from dora_mm.core.wrappers.experts import DoRAExperts
from dora_mm.formats.models import saved_layers
from dora_mm.formats.state import joined
from dora_mm.formats.tools.patterns import matching_key
from dora_mm.utils.json_text import parse_json

OUR_METADATA = "dora_mm"
NO_MAGNITUDES = "it has magnitudes of stacked experts, and PEFT's files hold plain LoRA of these alone"

_BASE_KEPT = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")  # values of init_lora_weights
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # and how values that modify the base begin
_NOT_COMPUTED = {  # settings of LoraConfig with which PEFT computes something else from the same tensors
    "alora_invocation_tokens": "which adapts only the tokens after these",
    "arrow_config": "which routes tokens between adapters",
    "ensure_weight_tying": "which adapts tied modules that the file does not name",
    "kasa_config": "which truncates the base weights and scales the ranks",
    "layer_replication": "which repeats layers of the base model",
    "lora_bias": "which adds a bias to B",
    "monteclora_config": "which samples the weights",
    "trainable_token_indices": "which trains rows of an embedding",
    "use_bdlora": "which makes A or B block-diagonal",
    "use_qalora": "which pools the input of A",
}

_NOT_MODULES = {"target_parameters": "which adapts parameters instead of modules"}

# Layers of types of models whose names PEFT 0.21 changes when it loads a file, as it does with those of transformers 4,
# so that it leaves out their adapters and says nothing. tests/models/vl/vlm/equalities.py tries all types.
_MISREAD = {
    "mistral_large4": r"shared_experts\.",
    "inkling2": r"\.sconv\.",
    "inkling2_loop": r"\.sconv\.",
    "deepseek_ocr2": r"language_model\.",
    "unlimited_ocr": r"language_model\.",
}


# --- writing ---------------------------------------------------------------------------------------------------------


def unsupported_reason(component: str, model: nn.Module) -> str | None:
    """The reason why PEFT would not compute the same function from a file, or None where it would.

    Args:
        component: The name of the model, for the message.
        model: The adapted model.
    """
    layers = {p: layer for p, layer in saved_layers(model).items() if layer.adaptation.spec.method != "full"}
    methods = sorted({layer.adaptation.spec.method for layer in layers.values()})
    if not methods:
        return f"{component} was trained by method full, whose weights are not an adapter: save it as format native"
    if len(methods) > 1:
        return f"a file holds one method per model, but {component} is adapted with {' and '.join(methods)}"
    misread = _MISREAD.get(getattr(getattr(model, "config", None), "model_type", ""))
    if misread and (path := next((path for path in layers if re.search(misread, path)), None)):
        return f"{joined(component, path)} is a layer whose adapter PEFT would leave out: save it as format native"
    for path, layer in layers.items():
        if reason := _why_peft_differs(layer, model.get_submodule(path.rpartition(".")[0])):
            return f"{joined(component, path)} is {reason}: merge the adapter instead, or save it as format native"
    return None


def _why_peft_differs(layer: AdaptedLayer, parent: nn.Module) -> str | None:
    if isinstance(layer, DoRAExperts):
        has_m = layer.adaptation.spec.method != "lora"
        return "a layer of stacked experts, of which PEFT's files hold plain LoRA alone" if has_m else None
    if isinstance(parent, nn.MultiheadAttention):
        return "a projection of an nn.MultiheadAttention, which PEFT would never call"
    if isinstance(layer, DoRAConv) and not _peft_computes(layer):
        return "a convolution with groups, dilation or a padding mode, which PEFT computes differently"
    if _wraps_its_base(layer) and not (isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")):
        base = layer.adaptation.base_class.__name__
        return f"a {base}, to whose result PEFT adds the update, after what it does to the product"
    return None


def _wraps_its_base(layer: AdaptedLayer) -> bool:
    """Whether the class of the base layer has its own `forward`, which calls the adapted one (and scales, say)."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return not issubclass(owner, AdaptedLayer)


def _peft_computes(conv: DoRAConv) -> bool:
    """PEFT 0.21 builds A without the base's dilation and padding mode, and splits B over groups."""
    return conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"


def lora_config(
    specs: Mapping[str, DoRASpec], *, transposed: bool, parameters: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The arguments of peft.LoraConfig.

    Args:
        specs: The settings of the adapted modules by path; PEFT takes these paths as suffixes of the model's.
        transposed: Whether a weight is stored (I, O).
        parameters: The paths of the parameters that are adapted instead of modules, those of stacked experts, by the
            paths in `specs`.
    """
    targets = {path: parameters.get(path, path) for path in specs}
    ranks = {targets[path]: 1 if spec.method == "magnitude" else spec.rank for path, spec in specs.items()}
    alphas = {targets[path]: _file_alpha(spec) for path, spec in specs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    spec = next(iter(specs.values()))
    found = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(path, ranks): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(path, alphas): a for path, a in alphas.items() if a != alpha},
        "target_modules": [path for path in specs if path not in parameters],
        "use_dora": spec.method != "lora",
        "lora_dropout": 0.0 if parameters else spec.dropout,  # which PEFT refuses over parameters
        "bias": "none",
        "fan_in_fan_out": transposed,
    }
    return found | ({"target_parameters": list(parameters.values())} if parameters else {})


def _pattern(path: str, paths: Iterable[str]) -> str:
    """The pattern of a path: PEFT takes a plain one for the end of others too, `0` for that of `layers.0`."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path


def our_config(specs: Mapping[Any, DoRASpec]) -> dict[str, Any]:
    """The settings that PEFT's config does not have; they are in the header under the key `OUR_METADATA`."""
    spec = next(iter(specs.values()))
    return {"method": spec.method, "norm_grad": spec.norm_grad, "dropout": spec.dropout}


def _file_alpha(spec: DoRASpec) -> float | int:
    assert spec.alpha is not None
    alpha = 1 if spec.method == "magnitude" else spec.alpha
    return int(alpha) if alpha == int(alpha) else alpha


# --- reading ---------------------------------------------------------------------------------------------------------


def check_config(name: str, config: Mapping[str, Any], *, reads_experts: bool = False) -> None:
    """Checks that the tensors are all there is to an adapter, and that they mean what they mean here.

    Args:
        name: What has the config, for messages.
        config: PEFT's LoraConfig; empty where the file has none.
        reads_experts: Whether parameters may be adapted instead of modules: see `peft_experts.in_model`.

    Raises:
        ValueError: The base weights were modified when the adapter was initialized, or it has a setting with which PEFT
            computes something else.
    """
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGED):
        raise ValueError(
            f"{name} has init_lora_weights {init:.50}, which modifies the base weights: the adapter is valid only with "
            "those. Convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    if init not in _BASE_KEPT:
        raise ValueError(f"{name} has init_lora_weights {init:.50}, which is unknown: it may modify the base weights")
    not_computed = _NOT_COMPUTED if reads_experts else {**_NOT_COMPUTED, **_NOT_MODULES}
    for key, reason in not_computed.items():
        if config.get(key):
            raise ValueError(f"{name} has the setting {key} of PEFT, {reason}: this is not supported")


def listed_names(names: Any) -> list[str]:
    """The names in a list of a header; a value that is no list counts as one name, which no file has."""
    return [f"{name!s:.200}" for name in (names if isinstance(names, list) else [names])]


def own_header(header: Mapping[str, str]) -> dict[str, Any]:
    """The settings under our key of a header, by `our_config`."""
    return parse_json(header.get(OUR_METADATA, "{}"), f"its header key {OUR_METADATA}")


def settings_in(config: Mapping[str, Any], ours: Any) -> dict[str, Any]:
    """The settings of a module from PEFT's config and our header (`our_config`), for `state.with_settings`."""
    if not isinstance(ours, Mapping):
        raise ValueError(f"its header key {OUR_METADATA} has values that are not JSON objects")
    own = {key: ours[key] for key in ("method", "norm_grad", "dropout") if key in ours}
    return own | ({"use_dora": bool(config["use_dora"])} if "use_dora" in config else {})


def alpha_in(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Alpha by PEFT's rules: the first key of `alpha_pattern` that matches the end of the path, else `lora_alpha`.

    With rank-stabilised LoRA the update is scaled by alpha / sqrt(rank). Without metadata alpha is the rank.
    """
    found = _of_module(config, "alpha_pattern", path, config.get("lora_alpha"))
    alpha = finite_number("alpha", rank if found is None else found)
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def scaling_in(config: Mapping[str, Any], path: str) -> float:
    """Alpha / r of a LoHa or LoKr by PEFT's rules, which do not check that its factors have this rank."""
    alpha = finite_number("alpha", _of_module(config, "alpha_pattern", path, config.get("alpha")))
    rank = finite_number("r", _of_module(config, "rank_pattern", path, config.get("r")))
    if not (alpha > 0 and rank > 0):
        raise ValueError(f"its alpha {alpha:g} and its rank {rank:g} are not both positive numbers")
    return alpha / rank


def rank_in(config: Mapping[str, Any], path: str) -> int:
    """The rank of a module by PEFT's rules: see `alpha_in`."""
    rank = finite_number("r", _of_module(config, "rank_pattern", path, config.get("r")))
    if rank < 1 or rank != int(rank):
        raise ValueError(f"its rank {rank:g} is not a positive whole number")
    return int(rank)


def _of_module(config: Mapping[str, Any], key: str, path: str, otherwise: Any) -> Any:
    """The value of the pattern that matches a module, or `otherwise`."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} is not a JSON object")
    try:
        pattern = matching_key(patterns, path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return otherwise if pattern is None else patterns[pattern]

"""What diffusers' and PEFT's formats have in common: how a layer's tensors are named, and PEFT's LoraConfig.

<path>.lora_A.weight             (R, I), of a convolution (R, I, *K)
<path>.lora_B.weight             (O, R), of a convolution (O, R, 1, ...)
<path>.lora_magnitude_vector     (O,),   of a convolution (1, O, 1, ...)

and of an embedding lora_embedding_A (R, num), lora_embedding_B (dim, R), lora_magnitude_vector (dim,).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.layer import DoRAConv, DoRATransposedLinear
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.patterns import matching_key
from dora_mm.formats.state import LayerState, joined, layers_of, weight_shape

OUR_METADATA = "dora_mm"

LAYER_KEY = (  # a pattern for the end of a key, after the component
    r"(?:(?P<path>.+)\.)?"
    r"(?P<name>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)

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
    "target_parameters": "which adapts parameters instead of modules",
    "trainable_token_indices": "which trains rows of an embedding",
    "use_bdlora": "which makes A or B block-diagonal",
    "use_qalora": "which pools the input of A",
}


# --- writing ---------------------------------------------------------------------------------------------------------


def why_not_held(component: str, model: nn.Module) -> str | None:
    """Why PEFT would not compute the same function from a file, or None where it would.

    Args:
        component: The name of the model, for the message.
        model: The adapted model.
    """
    layers = layers_of(model)
    methods = sorted({layer.adaptation.spec.method for layer in layers.values()})
    if "full" in methods:
        return f"{component} was trained by method full, whose weights are not an adapter: save it as format native"
    if len(methods) > 1:
        return f"a file holds one method per model, but {component} is adapted with {' and '.join(methods)}"
    for path, layer in layers.items():
        if reason := _why_peft_differs(layer, model.get_submodule(path.rpartition(".")[0])):
            return f"{joined(component, path)} is {reason}: merge the adapter instead, or save it as format native"
    return None


def _why_peft_differs(layer: AdaptedLayer, parent: nn.Module) -> str | None:
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


def to_file(layer: LayerState, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of one layer in the file, as float32.

    Args:
        layer: The adapter of the layer; without A and B (method `magnitude`) zeros of rank 1 are written for them.
        module: The layer, whose weight is (O, I), or of a convolution (O, I, *K).

    Returns:
        By the end of the key: "lora_A.weight" (R, I) or (R, I, *K), "lora_B.weight" (O, R) or (O, R, 1, ...), and,
        except for method `lora`, "lora_magnitude_vector" (O,) or (1, O, 1, ...). Of an embedding the first two are
        "lora_embedding_A" (R, num) and "lora_embedding_B" (dim, R).
    """
    shape = weight_shape(module)
    assert shape is not None
    tensors = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
    A = tensors.get("lora_A", torch.zeros(1, *shape[1:]))
    B = tensors.get("lora_B", torch.zeros(shape[0], 1))
    if isinstance(module, nn.Embedding):
        found = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        found = {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *(1,) * (len(shape) - 2))}
    if (magnitude := tensors.get("magnitude")) is not None:
        found["lora_magnitude_vector"] = magnitude if len(shape) == 2 else magnitude.view(1, -1, *(1,) * len(shape[2:]))
    return found


def lora_config(layers: Mapping[str, LayerState], model: nn.Module) -> dict[str, Any]:
    """The arguments of peft.LoraConfig.

    Args:
        layers: The adapters by module path; PEFT takes these paths as suffixes of the model's.
        model: The adapted model.
    """
    ranks = {path: _file_rank(layer.spec) for path, layer in layers.items()}
    alphas = {path: _file_alpha(layer.spec) for path, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    spec = next(iter(layers.values())).spec
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(path, ranks): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(path, alphas): a for path, a in alphas.items() if a != alpha},
        "target_modules": list(ranks),
        "use_dora": spec.method != "lora",
        "lora_dropout": spec.dropout,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(module, DoRATransposedLinear) for module in model.modules()),
    }


def _pattern(path: str, paths: Iterable[str]) -> str:
    """The pattern of a path: PEFT takes a plain one for the end of others too, `0` for that of `layers.0`."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path


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


def tensor_name(name: str) -> str:
    """The name of a tensor for `layer_state`: LAYER_KEY's without `.weight`, and of embeddings as of other layers."""
    return name.removesuffix(".weight").replace("lora_embedding_", "lora_")


def missing_names(names: Any, found: Collection[str]) -> list[str]:
    """The names of a header's list that are not in `found`; a value that is no list counts as a missing name."""
    listed = names if isinstance(names, list) else [names]
    return [f"{name!s:.200}" for name in listed if not isinstance(name, str) or name not in found]


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Checks that the tensors are all there is to an adapter, and that they mean what they mean here.

    Args:
        file: The file, for messages.
        config: PEFT's LoraConfig; empty where the file has none.

    Raises:
        ValueError: The base weights were modified when the adapter was initialized, or it has a setting with which PEFT
            computes something else.
    """
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGED):
        raise ValueError(
            f"{file} has init_lora_weights {init:.50}, which modifies the base weights: the adapter is valid only with "
            "those. Convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    if init not in _BASE_KEPT:
        raise ValueError(f"{file} has init_lora_weights {init:.50}, which is unknown: it may modify the base weights")
    for key, reason in _NOT_COMPUTED.items():
        if config.get(key):
            raise ValueError(f"{file} has the setting {key} of PEFT, {reason}: this is not supported")


def layer_state(file: Path, name: str, found: dict[str, Tensor], config: dict[str, Any], ours: dict) -> LayerState:
    """The adapter of one layer, from its tensors in the file.

    Args:
        file: The file, for messages.
        name: The component and the path of the layer, `joined`.
        found: The tensors of the layer by `lora_A`, `lora_B` and `lora_magnitude_vector`.
        config: PEFT's LoraConfig of the component; empty where the file has none.
        ours: The result of `our_config` when the file was written; empty for files of other tools.

    Raises:
        ValueError: A tensor is missing or is not a matrix, or the header contradicts the tensors or itself.
    """
    use_dora = config.get("use_dora", "lora_magnitude_vector" in found)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{file} is incomplete: the key {joined(name, missing[0])} is missing")
    if surplus := sorted(found.keys() - wanted):
        raise ValueError(f"{file} has the key {joined(name, surplus[0])}, but its header says that it is plain LoRA")
    if flat := [key for key in ("lora_A", "lora_B") if found[key].dim() < 2]:
        raise ValueError(f"{file} is damaged: its {name}.{flat[0]} is not a matrix")
    tensors = {"lora_A": found["lora_A"], "lora_B": found["lora_B"].flatten(1)}
    if use_dora:
        tensors["magnitude"] = found["lora_magnitude_vector"].flatten()
    rank = found["lora_A"].shape[0]
    method = ours.get("method", "dora" if use_dora else "lora")
    if method == "full" or bool(use_dora) == (method == "lora"):
        raise ValueError(
            f"{file} has a contradictory header for {name}: method {method!s:.50}, use_dora {use_dora!s:.50}"
        )
    if method == "magnitude":
        tensors = {"magnitude": tensors["magnitude"]}
    try:
        alpha = alpha_of(config, name.partition(".")[2], rank)
        spec = DoRASpec(rank, alpha, ours.get("dropout", 0.0), method, ours.get("norm_grad", "detached"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} has an invalid header for {name}: {error}") from error
    return LayerState(spec, tensors)


def alpha_of(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Alpha by PEFT's rules: the first key of `alpha_pattern` that matches the end of the path, else `lora_alpha`.

    With rank-stabilised LoRA the update is scaled by alpha / sqrt(rank). Without metadata alpha is the rank.
    """
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is not a JSON object")
    try:
        pattern = matching_key(patterns, path)
    except ValueError as error:
        raise ValueError(f"alpha_pattern: {error}") from error
    if pattern is not None:
        alpha = patterns[pattern]
    return alpha * rank**0.5 if config.get("use_rslora") else alpha

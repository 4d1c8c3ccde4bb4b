"""What a training of a vision-language model keeps in memory, as far as that can be told without a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn

from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.parts import MODEL
from dora_mm.adapting.sharding import Division
from dora_mm.config.vl import TrainVLConfig
from dora_mm.core import InjectReport, TargetMap
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.models.vl.vl_model import Structure
from dora_mm.preview.questions import DataPreview, LargestBatch
from dora_mm.preview.training import StepCost, memory_table

TEXT_PARTS = ("text", "cross")  # the parts of the language model are text.* and cross.*
# Numbers of token size that a layer keeps for its backward pass, per number that its linear layers return: of the
# layers themselves (attention without a matrix of L x L, norms, activation functions), and of adapters in addition.
# Counted in Llama and Qwen2 of transformers 5.24: 1.4 to 1.7, and 2.2 to 3.1 with all linear layers adapted.
KEPT_BY_LAYERS, KEPT_BY_ADAPTERS = 1.5, 1.5
KEPT_BY_CHECKPOINTS = 1.25  # of the size of a layer's input
LOGIT_BYTES = 12  # of a logit in half precision: itself, in float32, its log-softmax and gradient in turn
BITS = {"int8": 8.0, "torchao_int8": 8.0, "nf4": 4.13, "fp4": 4.13}  # of a weight, with the scales of its blocks


def network_parts(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Networks by their largest parts, such as the tower, the connector and the language model of "model".

    What belongs to none of the parts is left in the network itself, which comes last.
    """
    parts: dict[str, nn.Module] = {}
    for name, network in networks.items():
        inner = getattr(network, getattr(network, "base_model_prefix", "") or "", None)
        groups = [*(inner.named_children() if isinstance(inner, nn.Module) else ()), *network.named_children()]
        parts |= {child: module for child, module in groups if module is not inner and child not in networks}
        parts[name] = network
    return parts


def estimated_activations(
    network: Any, targets: TargetMap, report: InjectReport | None, batch: LargestBatch, width: int, checkpointing: bool
) -> int:
    """The bytes that a step keeps for its backward pass in the language model, from the sizes of its layers.

    Args:
        network: The model, on any device, adapted or not.
        targets: Its target map.
        report: What was adapted; None: nothing is.
        batch: The batch, all of whose tokens of text may carry loss.
        width: Bytes of a number of the computation.
        checkpointing: Layers are computed again in the backward pass.
    """
    config = network.config.get_text_config()
    names = [part for part in parts_in(network, targets) if part.split(".")[0] in TEXT_PARTS]
    linear = sum(_out_features(network.get_submodule(path)) for path in match_modules(network, targets.select(names)))
    modules = report.modules if report else ()
    adapted = sum(module.shape[0] for module in modules if module.part.split(".")[0] in TEXT_PARTS)
    layers = KEPT_BY_LAYERS * linear + KEPT_BY_ADAPTERS * adapted
    if checkpointing:
        depth = config.num_hidden_layers
        layers = KEPT_BY_CHECKPOINTS * depth * config.hidden_size + layers / depth
    return math.ceil(
        batch.num_computed * (batch.length * layers * width + batch.text * config.vocab_size * LOGIT_BYTES)
    )


def _out_features(layer: nn.Module) -> int:
    weight: Any = layer.weight
    return weight.shape[1] if type(layer).__name__ == "Conv1D" else weight.shape[0]


def quantized_bytes(network: Any, quantization: str | None) -> dict[int, int]:
    """The bytes of the weights that will be quantised, by `id`: of all linear layers but the one of the logits."""
    if quantization is None:
        return {}
    logits = network.get_output_embeddings()
    layers = (m for m in network.modules() if isinstance(m, nn.Linear) and m is not logits)
    return {id(layer.weight): math.ceil(layer.weight.numel() * BITS[quantization] / 8) for layer in layers}


def estimated_cost(
    config: TrainVLConfig,
    accelerator: Accelerator,
    structure: Structure,
    trained: TrainedNetworks,
    data: DataPreview,
    division: Division | None,
) -> str:
    """Memory of a training, from the sizes of its networks, and of its longest rows where those are known."""
    network, targets = structure.networks[MODEL], structure.target_maps[MODEL]
    cost = None
    if data.largest:
        half = config.train.mixed_precision != "no"
        activations = estimated_activations(
            network,
            targets,
            trained.reports.get(MODEL),
            data.largest,
            2 if half else 4,
            config.train.gradient_checkpointing,
        )
        cost = StepCost(None, activations, f"an estimate by the sizes of its layers, for {data.largest}")
    stored = quantized_bytes(network, config.model.quantization)
    details: dict[str, Any] = {"stored": stored, "place": accelerator.device.type, "ema": config.ema is not None}
    details["division"] = division
    return memory_table(network_parts(structure.networks), trained.parameters, config.optimizer, cost, **details)

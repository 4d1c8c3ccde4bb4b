"""Memory of a vision-language training, as far as it can be computed without running a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dora_mm.adapting.networks import TrainedNetworks, adapt, train_mode
from dora_mm.adapting.parts import MODEL
from dora_mm.adapting.sharding import Division
from dora_mm.config.vl import PreferenceConfig, TrainVLConfig
from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.models.quantization import stored_bytes
from dora_mm.models.vl.families import structure_of
from dora_mm.models.vl.vl_model import Structure, VLModel, weighted_loss
from dora_mm.preview.memory import memory_table
from dora_mm.preview.simulation import Machine, simulated_peak
from dora_mm.preview.streamed import stream_plan
from dora_mm.preview.training import PRECISIONS, StepCost, num_bytes
from dora_mm.preview.vl_data import DataPreview, batch_of
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.tasks.preferences import by_answer, pair_losses
from dora_mm.train.setup import checkpoint_activations
from dora_mm.utils.losses import LossSum

TOWER = "vision."  # how the names of the parts of a vision tower begin


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


def tower_work(network: Any, targets: TargetMap, batch: Any) -> int:
    """Parameters of the layers of a vision tower times the patches of a batch; 0 where the network has no tower.

    Args:
        network: The network.
        targets: Its target map.
        batch: A batch as the family's model makes it; one that has no `groups` of inputs has no patches either.
    """
    side = getattr(getattr(network.config, "vision_config", None), "patch_size", None)
    parts = [part for part in parts_in(network, targets) if part.startswith(TOWER)]
    if not isinstance(side, int) or not parts:
        return 0
    layers = (network.get_submodule(path) for path in match_modules(network, targets.select(parts)))
    size = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
    inputs = (pair for given, *_ in getattr(batch, "groups", ()) for pair in given.items())
    pixels = [tensor for name, tensor in inputs if name.startswith("pixel_values")]
    # of Qwen a row is a patch: of others the last sides are those of an image
    return size * sum(len(t) if t.dim() == 2 else t.numel() // (3 * side**2) for t in pixels)


def machine_of(config: TrainVLConfig, *, is_gpu: bool) -> Machine:
    """The machine that a training is planned for; autocast uses the config's precision, else that of half weights."""
    weights = getattr(torch, config.model.dtype)
    dtype = PRECISIONS.get(config.train.mixed_precision, weights if weights.itemsize < 4 else None)
    return Machine(is_gpu, dtype, triton=is_gpu and config.backend != "torch")


def estimated_activations(config: TrainVLConfig, batch: Any, *, is_gpu: bool) -> int:
    """The bytes that a step takes beyond weights, gradients and optimizer state, by a step without numbers.

    Args:
        config: The config.
        batch: A batch as the family's model makes it; such a family computes losses without weights.
        is_gpu: Whether the step runs on a GPU.

    Raises:
        ValueError: The class of the model needs numbers that are not there.
    """
    structure = structure_of(config.model, config.vision)
    assert structure.row_losses is not None
    for network in structure.networks.values():
        network.requires_grad_(False)
    trained = adapt(structure.networks, structure.target_maps, config.adapter, seed=config.seed, backend="torch")
    if config.train.gradient_checkpointing:
        checkpoint_activations(trained.networks[MODEL])
    train_mode(trained.networks.values())
    loss = partial(simulated_loss, config.preference, structure.row_losses)
    passes = config.train.gradient_accumulation_steps
    try:
        peak = simulated_peak(trained.networks, loss, batch, passes, machine_of(config, is_gpu=is_gpu))
    except Exception as error:  # whatever a class does where a number should be
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(structure.networks[MODEL]).__name__} cannot run without numbers ({reason})") from error
    return max(0, peak - num_bytes(trained.parameters.values()))


def simulated_loss(
    preference: PreferenceConfig, row_losses: Callable[[Any], tuple[Tensor, Tensor]], batch: Any
) -> LossSum:
    """The loss of a batch; of pairs without the pass of their reference, which keeps nothing and takes less."""
    sums, counts = row_losses(batch)
    if not TASKS[batch.task].pairs:
        return weighted_loss(batch.task, sums, counts, batch.weights)
    losses = pair_losses(preference, -by_answer(sums), by_answer(counts))
    return LossSum(losses.sum(), torch.ones_like(losses).sum())


def quantized_bytes(network: Any, quantization: str | None) -> dict[int, int]:
    """The bytes of the weights that will be quantised, by `id`: of all linear layers but the one of the logits."""
    if quantization is None:
        return {}
    logits = network.get_output_embeddings()
    layers = (m for m in network.modules() if isinstance(m, nn.Linear) and m is not logits)
    return {id(layer.weight): stored_bytes(layer.weight, quantization) for layer in layers}


def estimated_cost(
    config: TrainVLConfig,
    accelerator: Accelerator,
    structure: Structure,
    trained: TrainedNetworks,
    model: VLModel | None,
    data: DataPreview,
    division: Division | None,
) -> str:
    """Memory of a training, from the sizes of its networks, and of its longest rows where those are known."""
    network, cost, remarks = structure.networks[MODEL], None, []
    if model is not None and data.largest:
        try:
            on_gpu = accelerator.device.type != "cpu"
            activations = estimated_activations(config, batch_of(model, data.sets, data.largest), is_gpu=on_gpu)
            cost = StepCost(None, activations, f"an estimate, for {data.largest}")
        except ValueError as error:
            remarks.append(f"activations are not estimated: {error}")
    stored = quantized_bytes(network, config.model.quantization)
    details: dict[str, Any] = {"stored": stored, "ema": config.ema is not None, "division": division}
    details["target_device"] = accelerator.device.type
    settings = {"stored": stored, "passes": config.train.gradient_accumulation_steps}
    details["plan"] = stream_plan(network, structure.target_maps[MODEL], config.memory.stream, **settings)
    table = memory_table(network_parts(structure.networks), trained.parameters, config.optimizer, cost, **details)
    return "\n".join([table, *remarks])

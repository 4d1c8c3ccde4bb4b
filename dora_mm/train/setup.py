"""Training setup from a config: optimizer, schedule and networks, without batches."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from dora_mm.adapting.networks import TrainedNetworks, train_mode
from dora_mm.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from dora_mm.train.optim import build_optimizer
from dora_mm.train.schedule import Schedule
from dora_mm.utils.losses import LossSum


class TrainingConfig(Protocol):
    """The config of any training."""

    seed: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


def training_setup(
    accelerator: Accelerator,
    config: TrainingConfig,
    train: TrainConfig,
    trained: TrainedNetworks,
    loss: Callable[[Any, torch.Generator], LossSum],
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Makes optimizer and schedule, and puts the networks in training mode.

    Args:
        accelerator: Knows device and mixed precision.
        config: The config, for all sections but `train`.
        train: Its `train` section with the number of steps.
        trained: What is trained, the main network first.
        loss: The loss of a batch, see `fit`.
        others: Further modules with trained parameters, by name.

    Returns:
        The arguments of `fit`, and of `measure_step`, by name, but for `run` and `batch_at`.
    """
    optimizer = build_optimizer(trained.parameters, config.optimizer, trained.rates)
    if train.gradient_checkpointing:
        checkpoint_activations(next(iter(trained.networks.values())))
    train_mode(trained.networks.values())  # without it, dropout and checkpointing have no effect
    return {
        "accelerator": accelerator,
        "config": train,
        "seed": config.seed,
        "networks": {**trained.networks, **(others or {})},
        "parameters": trained.parameters,
        "optimizer": accelerator.prepare(optimizer),
        "schedule": Schedule(optimizer, config.schedule, train.steps),
        "loss": loss,
    }


def checkpoint_activations(network: Any) -> None:
    """Lets a network compute its blocks again in the backward pass, instead of keeping their activations."""
    if not hasattr(network, "activation_checkpointing_enable"):  # transformers has it, diffusers the other one
        network.enable_gradient_checkpointing()
        return
    network.activation_checkpointing_enable()
    network.disable_input_require_grads()  # they would go through a frozen tower, and BLIP adds to its inputs

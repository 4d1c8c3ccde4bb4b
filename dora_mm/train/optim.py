"""Builds the optimiser that a config names."""

import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_mm.config.training import EpochTrainConfig, OptimizerConfig, ScheduleConfig, TrainConfig


class Kind(NamedTuple):
    """An optimizer.

    Attributes:
        module: Where its class is.
        name: The name of the class.
        extra: The extra of dora_mm that installs the module; empty for torch's own.
        settings: Further arguments of the class.
    """

    module: str
    name: str
    extra: str = ""
    settings: Mapping[str, Any] = MappingProxyType({})


OPTIMIZERS = {
    "adamw": Kind("torch.optim", "AdamW", settings={"fused": True}),  # one kernel for hundreds of small tensors
    # Its authors recommend bias correction and the warm-up safeguard for diffusion models.
    "prodigy": Kind("prodigyopt", "Prodigy", "optim", {"use_bias_correction": True, "safeguard_warmup": True}),
    "adamw_8bit": Kind("bitsandbytes.optim", "AdamW8bit", "quant"),
    "paged_adamw_8bit": Kind("bitsandbytes.optim", "PagedAdamW8bit", "quant"),
}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Builds the optimiser. Parameters of different learning rates or weight decay form groups.

    Args:
        parameters: The trained parameters by name.
        config: The `optimizer` section.
        rates: The learning rates that differ from the config's, by the names of their parameters.

    Raises:
        ValueError: There is nothing to train, or the optimiser's package is not installed.
    """
    if not parameters:
        raise ValueError("There is nothing to train: the config selects no parameters.")
    groups = _groups(parameters, config, rates or {})
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    kind = OPTIMIZERS[config.name]
    return _imported(kind)(groups, **settings, **kind.settings)


def _imported(kind: Kind) -> Any:
    try:
        return getattr(importlib.import_module(kind.module), kind.name)
    except ImportError:
        package = kind.module.partition(".")[0]
        raise ValueError(
            f"this optimizer.name needs the package {package}: pip install 'dora_mm[{kind.extra}]'"
        ) from None


def _groups(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = rates.get(name, config.lr)
        if name.endswith("magnitude") and config.magnitude_lr is not None:
            rate = config.magnitude_lr
        decay = config.weight_decay if config.decay_biases or not name.endswith(".bias") else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    shown_first = sorted(groups.items(), key=lambda group: group[0][0] != config.lr)  # the rate that metrics have
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in shown_first]


def with_steps(train: EpochTrainConfig, schedule: ScheduleConfig, steps_per_epoch: int) -> TrainConfig:
    """Returns the training settings with `epochs` converted to optimizer steps.

    Args:
        train: The `train` section, with either `steps` or `epochs`.
        schedule: The `schedule` section.
        steps_per_epoch: Optimizer steps in one pass over the data.

    Raises:
        ValueError: `schedule.warmup_steps` is not below the number of steps.
    """
    steps = train.steps or (train.epochs or 1) * steps_per_epoch
    if schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be below the {steps} steps of train.epochs"
        )
    return train.model_copy(update={"steps": steps})


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients concatenated, (), without clipping them."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

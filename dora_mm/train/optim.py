"""Builds the optimiser that a config names."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dora_mm.config.schema import EpochTrainConfig, OptimizerConfig, ScheduleConfig, TrainConfig


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Builds the optimiser; magnitudes form a separate parameter group if `optimizer.magnitude_lr` is set.

    Args:
        parameters: The trained parameters by name.
        config: The `optimizer` section.

    Raises:
        ValueError: There is nothing to train, or the optimiser's package is not installed.
    """
    if not parameters:
        raise ValueError("There is nothing to train: the config selects no parameters.")
    groups = _groups(parameters, config)
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one kernel for hundreds of small tensors
        )
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ValueError(
            "optimizer.name prodigy needs the package prodigyopt: run pip install 'dora_mm[optim]'."
        ) from None
    # Its authors recommend bias correction and the warm-up safeguard for diffusion models.
    return Prodigy(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,  # type: ignore[arg-type]  # annotated as int
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def _groups(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict]:
    def is_magnitude(name: str) -> bool:
        return name.endswith("magnitude")

    if config.magnitude_lr is None:
        return [{"params": list(parameters.values())}]
    split = {
        config.lr: [p for name, p in parameters.items() if not is_magnitude(name)],
        config.magnitude_lr: [p for name, p in parameters.items() if is_magnitude(name)],
    }
    if config.lr == config.magnitude_lr:
        return [{"params": list(parameters.values())}]
    return [{"params": members, "lr": lr} for lr, members in split.items() if members]


def with_steps(train: EpochTrainConfig, schedule: ScheduleConfig, batches_per_epoch: int) -> TrainConfig:
    """Returns the training settings with `epochs` converted to optimizer steps.

    Args:
        train: The `train` section, with either `steps` or `epochs`.
        schedule: The `schedule` section.
        batches_per_epoch: Micro-batches in one pass over the data.

    Raises:
        ValueError: `schedule.warmup_steps` is not below the number of steps.
    """
    steps = train.steps or -(-(train.epochs or 1) * batches_per_epoch // train.gradient_accumulation_steps)
    if schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be below the {steps} steps of train.epochs"
        )
    return train.model_copy(update={"steps": steps})


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients concatenated, (), without clipping them."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

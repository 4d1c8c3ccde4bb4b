"""Builds the optimiser that a config names."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dora_mm.config.training import EpochTrainConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from dora_mm.registries.optimizers import OPTIMIZERS, Optimizer
from dora_mm.registries.registry import load
from dora_mm.train.state_file import encoded
from dora_mm.utils.messages import first_line, nearest

LEAST_OF_8_BITS = 4096  # numbers in a tensor from which bitsandbytes keeps its state in 8 bits
OWN_KEYS = ("lr", "betas", "eps", "weight_decay")  # arguments that have a key of their own in the section


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Builds the optimiser. Parameters of different learning rates or weight decay form groups.

    Args:
        parameters: The trained parameters by name.
        config: The `optimizer` section.
        rates: The learning rates that differ from the config's, by the names of their parameters.

    Raises:
        ValueError: There is nothing to train, the optimiser's package is not installed, or it has no such setting.
    """
    if not parameters:
        raise ValueError("There is nothing to train: the config selects no parameters.")
    optimizer_class = _imported(OPTIMIZERS[config.name])
    settings = _settings(config, optimizer_class)
    try:
        optimizer: Any = optimizer_class(_groups(parameters, config, rates or {}), lr=config.lr, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer.name {config.name}: {error}") from None
    if config.name == "schedule_free":
        optimizer.train()  # for good: `averaged_point` computes what its `eval` would, which changes some bits
    return optimizer


def averaged_point(optimizer: Any) -> dict[nn.Parameter, torch.Tensor] | None:
    """The result of a schedule-free training so far, x = y + (1 - 1 / beta) (z - y), in tensors of its own.

    Returns:
        The values by parameter; None: of other optimizers the parameters themselves are the result.
    """
    if "train_mode" not in optimizer.param_groups[0]:
        return None
    found: dict[nn.Parameter, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            z = optimizer.state.get(parameter, {}).get("z", parameter.detach())
            found[parameter] = parameter.detach().lerp(z, 1 - 1 / group["betas"][0])
    return found


def check_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """Checks that an optimizer can step on a device, and be saved, before anything is loaded: it takes a step.

    Raises:
        ValueError: It needs a GPU, or its package, or that does not run on this one; it has no such setting; or its
            state has values that a checkpoint cannot hold.
    """
    needs_gpu = OPTIMIZERS[config.name].needs_gpu
    if needs_gpu and device.type in ("cpu", "mps"):
        raise ValueError(
            f"optimizer.name {config.name} needs a GPU, and this training is on {device.type}: "
            "--set optimizer.name=adamw"
        )
    tried = nn.Parameter(torch.zeros(LEAST_OF_8_BITS, device=device))
    tried.grad = torch.zeros_like(tried)
    optimizer = build_optimizer({"tried": tried}, config)
    try:
        optimizer.step()
    except Exception as error:  # whatever its package raises on a GPU that it was not built for
        machine = "GPU" if needs_gpu else "machine"
        raise ValueError(
            f"optimizer.name {config.name} does not run on this {machine} ({first_line(error)}): choose another one"
        ) from None
    try:
        encoded(optimizer.state_dict(), "its state", {})
    except ValueError as error:
        raise ValueError(f"optimizer.name {config.name}: {error}, so that a run could not be resumed") from None


def _settings(config: OptimizerConfig, optimizer_class: Any) -> dict[str, Any]:
    """The arguments of an optimizer other than its rates; those from a config are checked against its signature."""
    values = {"betas": config.betas, "eps": config.eps}
    given = {key: value for key, value in values.items() if value is not None}
    known = dict(inspect.signature(optimizer_class).parameters)
    del known["params"]
    for key in given:
        if key not in known:
            raise ValueError(f"optimizer.{key} has no effect: {config.name} has none")
        if key == "eps" and isinstance(known[key].default, tuple):
            raise ValueError(f"optimizer.eps: {config.name} has two, {known[key].default}: leave it out")
    for key in config.options:
        if key in OWN_KEYS:
            raise ValueError(f"optimizer.options.{key} is the key optimizer.{key}")
        if key not in known:
            others = [name for name in known if name not in OWN_KEYS]
            raise ValueError(
                f"optimizer.options.{key}: {config.name} has no such argument{nearest(key, others)}; it has "
                f"{', '.join(others)}"
            )
    return {**OPTIMIZERS[config.name].settings, **given, **config.options}


def _imported(optimizer: Optimizer) -> Any:
    try:
        return load(optimizer.import_path)
    except ImportError:
        package = re.split(r"[.:]", optimizer.import_path)[0]
        raise ValueError(
            f"this optimizer.name needs the package {package}: pip install {optimizer.install or package}"
        ) from None


def _groups(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = rates.get(name, config.lr)
        if name.endswith("magnitude") and config.magnitude_lr is not None:
            rate = config.magnitude_lr
        if name.endswith("lora_B"):
            rate *= config.b_lr_ratio
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
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be below the {steps} steps of train.epochs: "
            "set fewer, or schedule.warmup_ratio"
        )
    return train.model_copy(update={"steps": steps})

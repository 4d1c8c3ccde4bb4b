"""Trains one stage of a pretraining."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer
from dora_mm.train.schedule import Schedule
from dora_mm.utils.losses import LossSum
from dora_mm.utils.run_directory import RunDirectory
from samples.build.schema import PretrainStage


def train_stage(
    seed: int,
    stage: PretrainStage,
    networks: dict[str, Any],
    loss: Callable[[Any, torch.Generator], torch.Tensor],
    batch_at: Callable[[int], Any],
    run: RunDirectory,
    state: dict[str, Any] | None = None,
    **hooks: Any,
) -> None:
    """Trains all parameters of some networks.

    Args:
        seed: The seed of the config.
        stage: The config's section for this stage.
        networks: The networks by name.
        loss: A batch and a random generator -> the mean loss; all batches of a stage are of one size.
        batch_at: Number of a micro-batch -> the batch.
        run: The directory of the stage.
        state: Further objects with a state dict, for the checkpoints.
        **hooks: `after_step` and `on_step_end` of `fit`.
    """
    accelerator = Accelerator(mixed_precision=stage.train.mixed_precision)
    parameters = {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in network.train().requires_grad_(True).named_parameters()
    }
    for name in ("vae", "unet"):
        if name in networks and stage.train.gradient_checkpointing:
            networks[name].enable_gradient_checkpointing()
    optimizer = build_optimizer(parameters, stage.optimizer)
    schedule = Schedule(optimizer, stage.schedule, stage.train.steps)
    optimizer = accelerator.prepare(optimizer)
    fit(
        accelerator=accelerator,
        run=run,
        config=stage.train,
        seed=seed,
        networks=networks,
        parameters=parameters,
        optimizer=optimizer,
        schedule=schedule,
        batch_at=lambda number: send_to_device(batch_at(number), accelerator.device),
        loss=lambda batch, stream: LossSum(loss(batch, stream), torch.ones((), device=accelerator.device)),
        state=state,
        **hooks,
    )

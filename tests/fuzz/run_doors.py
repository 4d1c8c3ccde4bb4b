"""The doors to the checkpoints of a run that somebody else has made, with the digests of what they hold."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_mm.config.training import OptimizerConfig, ScheduleConfig
from dora_mm.train.checkpoint import ABOUT, FORMER_STATE, STATE, WEIGHTS, load_checkpoint, save_checkpoint
from dora_mm.train.metrics import TrainingProgress
from dora_mm.train.optim import build_optimizer
from dora_mm.train.schedule import Schedule
from dora_mm.train.state_file import read_state
from dora_mm.utils.digest import file_digest
from tests.fuzz.door import Door

STEP = "step-000002"


def training() -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """Two parameters, and what else a training without a model has."""
    parameters = {name: nn.Parameter(torch.arange(6.0).reshape(2, 3) + number) for number, name in enumerate("AB")}
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.01))
    schedule = Schedule(optimizer, ScheduleConfig(), steps=4)
    return parameters, {"optimizer": optimizer, "schedule": schedule, "progress": TrainingProgress(4, 1, shown=False)}


def step(parameters: dict[str, nn.Parameter], parts: dict[str, Any]) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    parts["optimizer"].step()
    parts["schedule"].step()
    parts["progress"].start(2)
    parts["progress"].advance(0.5, 0.01)


def make_checkpoint(folder: Path) -> None:
    parameters, parts = training()
    for _ in range(2):
        step(parameters, parts)
    save_checkpoint(folder, 2, parameters, parts, 1)


def make_former(folder: Path) -> None:
    make_checkpoint(folder)
    file = folder / STEP / STATE
    torch.save(read_state(file), file.with_name(FORMER_STATE))
    file.unlink()


def read_checkpoint(state: str) -> Any:
    """What a training that is resumed reads with its model in memory."""

    def read(folder: Path) -> None:
        digests = {name: file_digest(folder / STEP / name) for name in (WEIGHTS, state)}
        (folder / STEP / ABOUT).write_text(json.dumps({"step": 2, "digests": digests}))
        parameters, parts = training()
        load_checkpoint(folder / STEP, parameters, parts)

    return read


RUN_DOORS = (
    Door("checkpoint", make_checkpoint, (f"{STEP}/{STATE}", f"{STEP}/{STATE}", f"{STEP}/{WEIGHTS}"),
         read_checkpoint(STATE)),
    Door("former checkpoint", make_former, (f"{STEP}/{FORMER_STATE}",), read_checkpoint(FORMER_STATE)),
)  # fmt: skip

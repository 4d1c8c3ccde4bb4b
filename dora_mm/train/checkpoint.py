"""Checkpoints that are there whole or not at all: written beside, synced, renamed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dora_mm.utils.atomic import flush

WEIGHTS, STATE, ABOUT = "weights.safetensors", "state.pt", "checkpoint.json"


class Stateful(Protocol):
    """What an optimiser, a schedule, a gradient scaler and an EMA have in common."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save_checkpoint(
    folder: Path, step: int, parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Stateful], keep: int
) -> Path:
    """Writes `folder`/step-NNNNNN after `step` finished steps, then deletes all but the newest `keep`."""
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left behind
    partial.mkdir(parents=True)
    weights = {name: parameter.detach().contiguous().cpu() for name, parameter in parameters.items()}
    try:
        save_file(weights, partial / WEIGHTS)
        with (partial / STATE).open("wb") as file:  # given a path, torch's error does not say that the disk is full
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        (partial / ABOUT).write_text(json.dumps({"step": step}))
        for file in partial.iterdir():
            flush(file)
        if final.exists():  # the same step again, after a resume: the same bits
            shutil.rmtree(final)
        os.rename(partial, final)
        flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / ABOUT).is_file())


def last_step(folder: Path) -> int:
    """The number of steps that the newest checkpoint has finished; 0 without one."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def load_checkpoint(path: Path, parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Stateful]) -> int:
    """Restores parameters and parts in place and returns the number of finished steps.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another model.
    """
    try:
        weights = load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        step = json.loads((path / ABOUT).read_text())["step"]
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}): delete it to resume from the one before."
        ) from None
    for names, expected in ((weights, parameters), (state, parts)):
        if difference := sorted(set(names) ^ set(expected)):
            raise ValueError(f"{path} belongs to another model or config: {difference[0]} is in only one of the two.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{path} belongs to another model: {name} has shape {tuple(weights[name].shape)}.")
        parameter.data.copy_(weights[name])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return step

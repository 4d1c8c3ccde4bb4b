"""Checkpoints that appear complete or not at all: written under a temporary name, flushed to disk, then renamed."""

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dora_mm.config.training import TrainConfig
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.files.tensor_file import TensorFile
from dora_mm.formats.tools.native import FILE_NAME
from dora_mm.train.state_file import read_state, write_state
from dora_mm.utils.atomic import flush
from dora_mm.utils.digest import file_digest
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.lock import check_lock, make_folder
from dora_mm.utils.messages import first_line
from dora_mm.utils.partials import partial_of
from dora_mm.utils.pickles import read_tensor_pickle
from dora_mm.utils.tensor_writer import write_tensor_file

log = logging.getLogger(__name__)
WEIGHTS, STATE, ABOUT = FILE_NAME, "state.safetensors", "checkpoint.json"  # the weights are also an adapter file
FORMER_STATE = "state.pt"  # of torch.save, in runs of before


class Stateful(Protocol):
    """Anything with a state dict, such as an optimiser, a schedule, a gradient scaler or an EMA."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain Python values: see `state_file.write_state`."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restores what `state_dict` returned."""
        ...


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Stateful],
    keep: int,
    header: Mapping[str, str] | None = None,
) -> Path:
    """Writes the checkpoint `folder`/step-NNNNNN, then deletes all but the newest `keep` checkpoints.

    Args:
        folder: The run's checkpoint folder; created if missing.
        step: The number of finished optimizer steps.
        parameters: The trained parameters by name.
        parts: Everything else that has a state, such as the optimizer, by name.
        keep: How many checkpoints remain, this one included.
        header: Metadata of the weights file.

    Returns:
        The folder of the new checkpoint.

    Raises:
        OSError: The checkpoint cannot be written, for example because the disk is full; no partial one remains.
            Torch may wrap it in another exception.
        ValueError: Another process has taken over the run.
    """
    check_lock(folder)
    final = folder / f"step-{step:06d}"
    make_folder(folder)
    try:
        with partial_of(final, is_folder=True) as partial:
            _write_files(partial, step, parameters, parts, header or {})
            check_lock(folder)
            if final.exists():  # a resumed run repeats this step with the same bits
                shutil.rmtree(final)
            os.rename(partial, final)
            flush(folder)
    except BaseException:
        check_lock(folder)  # who has taken the run over has removed what was half written in it
        raise
    keep_newest(folder, keep)
    return final


def _write_files(
    folder: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Stateful],
    header: Mapping[str, str],
) -> None:
    write_tensor_file(folder / WEIGHTS, parameters, header)
    write_state(folder / STATE, {name: part.state_dict() for name, part in parts.items()})
    digests = {name: file_digest(folder / name) for name in (WEIGHTS, STATE)}
    (folder / ABOUT).write_text(json.dumps({"step": step, "digests": digests}), encoding="utf-8")
    for file in folder.iterdir():
        flush(file)


def keep_newest(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints: after each new one, and of a run that was killed in between."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def is_due(train: TrainConfig, step: int) -> bool:
    """Whether a checkpoint belongs to a step, be it interrupted or not."""
    return step == train.steps or (train.checkpoint_every > 0 and step % train.checkpoint_every == 0)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of finished steps of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def last_step(folder: Path) -> int:
    """The number of finished steps in the newest checkpoint, or 0 if there is none."""
    found = checkpoints(folder)
    return step_of(found[-1]) if found else 0


def damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint's files, found by the digests that it was saved with; None if intact."""
    try:
        about = parse_json((checkpoint / ABOUT).read_bytes(), ABOUT)
        if about["step"] != step_of(checkpoint):
            return f"{ABOUT} has another step"
        for name in (WEIGHTS, STATE if STATE in about["digests"] else FORMER_STATE):
            if file_digest(checkpoint / name) != about["digests"][name]:
                return f"{name} is not as it was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"{ABOUT} cannot be read ({first_line(error)})"
    return None


def set_damaged_aside(folder: Path) -> None:
    """Renames the newest checkpoints of a run to damaged-step-NNNNNN, up to the first one that is intact.

    Raises:
        ValueError: There are checkpoints, and none is intact.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        if (problem := damage(path)) is None:
            break
        damaged[path] = problem
    else:
        if damaged:
            found = ", ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
            raise ValueError(f"{folder} has no checkpoint that is intact ({found}): delete it to start from step 0.")
    for path, problem in damaged.items():
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log.warning("The checkpoint %s is damaged (%s), and set aside as %s.", path, problem, aside.name)
    if damaged:
        log.warning("The run goes on from the checkpoint of step %d.", last_step(folder))


def load_parts(path: Path, parts: Mapping[str, Stateful]) -> None:
    """Restores some of the parts of a checkpoint, those that say whether a training may go on from it.

    Args:
        path: The folder of a checkpoint that is intact.
        parts: As for `load_checkpoint`, where all are given.
    """
    _restore(path, parts, _state_in(path, parts))


def _state_in(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """The states in a checkpoint, all or some of them."""
    if (path / STATE).exists():
        return read_state(path / STATE, names)
    found = read_tensor_pickle(path / FORMER_STATE)
    return found if names is None else {name: found[name] for name in names}


def load_checkpoint(path: Path, parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Stateful]) -> int:
    """Restores parameters and parts in place.

    Args:
        path: The folder of one checkpoint.
        parameters: The trained parameters by name, as given to `save_checkpoint`.
        parts: The other objects with a state, by the same names as when saving.

    Returns:
        The number of finished optimizer steps.

    Raises:
        ValueError: The checkpoint is damaged, or belongs to another model or config.
    """
    if problem := damage(path):
        raise ValueError(f"{path} is damaged: {problem}. Delete it to resume from the one before.")
    file = TensorFile(path / WEIGHTS)
    weights = {name: file.read(name) for name in file.entries}
    state = _state_in(path)
    for names, expected in ((weights, parameters), (state, parts)):
        if difference := sorted(set(names) ^ set(expected)):
            raise ValueError(f"{path} belongs to another model or config: {difference[0]} is only in one of them.")
    if name := first_not_finite(weights.items()):
        raise ValueError(
            f"{path}: {name} has values that are NaN or infinite: delete it to resume from the one before."
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
            raise ValueError(f"{path} belongs to another model: {name} has shape {shapes}.")
        parameter.data.copy_(weights[name])
    _restore(path, parts, state)
    return step_of(path)


def _restore(path: Path, parts: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # as values of other types bring
            raise ValueError(
                f"{path} is damaged, or belongs to another config: its {name} is not as it was saved ({error!r:.200})"
            ) from error

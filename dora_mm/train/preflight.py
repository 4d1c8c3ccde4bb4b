"""The checks ahead of a training, in one list: its dry run runs them as well, and they come before anything large."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from dora_mm.adapting.compiled import check_compiler
from dora_mm.config.paths import path_problems, resolve_model
from dora_mm.models.hub import check_hub
from dora_mm.models.quantization import check_installed
from dora_mm.train.checkpoint import last_step
from dora_mm.train.optim import check_optimizer
from dora_mm.train.processes import check_can_shard
from dora_mm.train.run import check_length
from dora_mm.train.sharing import check_processes
from dora_mm.train.trackers import chosen_trackers
from dora_mm.utils.messages import raised_by_us
from dora_mm.utils.run_directory import RunDirectory

Problems = dict[str, list[str]]  # sentences by the name of the check that has found them
Check = Callable[[], object]
PATHS, ROWS = "files and output", "rows"
OPTIMIZER, QUANTIZATION = "optimizer", "quantization"  # no step can be measured where these fail


def preflight(accelerator: Accelerator, config: Any, resume: Path | None, rows: Check | None = None) -> Problems:
    """Runs all checks of a training that need no model, in each of its processes.

    Args:
        accelerator: Knows the device and the processes, each of which has to call this.
        config: The config of the training.
        resume: The run directory to resume; None: a new run starts.
        rows: Reads the rows of the data and raises ValueError; called where nothing else is wrong, since it may take
            minutes. None: the caller reads them.

    Returns:
        The problems of all processes. Each waits until all were checked, so that none finds the output folder that
        another one has made.
    """
    found = {PATHS: list(path_problems(config, new_run=resume is None))}
    found |= {name: _problems(check) for name, check in checks(accelerator, config, resume).items()}
    found = _of_all_processes(found)
    if rows and not found:
        found = _of_all_processes({ROWS: _problems(rows)})
    return found


def checks(accelerator: Accelerator, config: Any, resume: Path | None) -> Mapping[str, Check]:
    """The checks by name, each of which raises ValueError."""
    model, train, device = config.model, config.train, accelerator.device
    found: dict[str, Check] = {
        "trackers": partial(chosen_trackers, train.track),
        OPTIMIZER: partial(check_optimizer, config.optimizer, device),
        "sharding": partial(check_can_shard, accelerator, train),
    }
    if train.compile:
        found["compiler"] = partial(check_compiler, device)
    for key in ("quantization", "text_quantization"):
        if name := getattr(model, key, None):
            found[QUANTIZATION] = partial(check_installed, name, f"model.{key}")
    if resume is None:
        found["hub"] = lambda: check_hub(resolve_model(model.path), model.revision, key="model.path")
    if resume is not None:
        found["processes"] = partial(check_processes, resume, train, accelerator.num_processes)
    if resume is not None and train.steps:
        found["length"] = partial(check_length, resume, finished_steps(resume), train.steps)
    return found


def finished_steps(resume: Path | None) -> int:
    """The steps that the run to resume has finished; 0: a new run starts."""
    return last_step(RunDirectory(resume).checkpoints) if resume else 0


def stop_at(problems: Problems) -> None:
    """Reports all problems.

    Raises:
        ValueError: There are some.
    """
    sentences = list(dict.fromkeys(sentence for found in problems.values() for sentence in found))
    if len(sentences) == 1:
        raise ValueError(sentences[0])
    if sentences:
        raise ValueError("\n  ".join([f"{len(sentences)} problems stop this training:", *sentences]))


def first_problem(problems: Problems, names: Sequence[str]) -> str | None:
    """The first sentence of the checks with these names; None: they have found nothing."""
    return next((sentence for name in names for sentence in problems.get(name, ())), None)


def _problems(check: Check) -> list[str]:
    try:
        check()
    except ValueError as error:
        if not raised_by_us(error):  # a bug
            raise
        return [str(error)]
    return []


def _of_all_processes(found: Problems) -> Problems:
    """The problems of all processes, without checks that have found none."""
    merged: Problems = {}
    for each in gather_object([found]):
        for name, sentences in each.items():
            merged[name] = list(dict.fromkeys([*merged.get(name, ()), *sentences]))
    return {name: sentences for name, sentences in merged.items() if sentences}

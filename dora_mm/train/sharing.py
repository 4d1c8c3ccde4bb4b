"""How the processes of a training share the micro-batches of an optimizer step, also when a run is resumed by others.

A micro-batch and its noise depend only on its number. Those of a step have consecutive numbers, as many as processes
times accumulated ones. So a resumed run has the same steps with another number of processes that divides this product:
each then accumulates another number, and only the order in which gradients are summed differs.
"""

from pathlib import Path
from typing import TypeVar

from dora_mm.config.schema import PipelineConfig
from dora_mm.config.training import TrainConfig
from dora_mm.utils.run_directory import INPUTS, RunDirectory

PROCESSES, MICRO_BATCHES = "the number of processes", "the micro-batches of a step"  # in inputs.json, of the start
CIRCUMSTANCE = "processes"  # in the records of circumstances

ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


def recorded(train: TrainConfig, count: int) -> dict[str, str]:
    """The record of a new run: its processes, and the micro-batches of its steps, by which damage would be found.

    Args:
        train: The `train` section of its config.
        count: The number of processes.
    """
    return {PROCESSES: str(count), MICRO_BATCHES: str(count * train.gradient_accumulation_steps)}


def started_with(run: Path, train: TrainConfig) -> int:
    """The number of processes that a run was started with.

    Args:
        run: The run directory.
        train: The `train` section of its config.

    Raises:
        ValueError: inputs.json is missing or damaged.
    """
    inputs = RunDirectory(run).inputs
    text = str(inputs.get(PROCESSES))
    count = int(text) if text.isdecimal() else 0
    expected = recorded(train, count)[MICRO_BATCHES]  # earlier releases did not record it
    if not count or inputs.get(MICRO_BATCHES, expected) != expected:
        raise ValueError(f"{run / INPUTS} is damaged ({PROCESSES}): the run cannot go on without it.")
    return count


def micro_batches(run: Path, train: TrainConfig) -> int:
    """The micro-batches of each step of a run, on all processes; arguments and errors as of `started_with`."""
    return started_with(run, train) * train.gradient_accumulation_steps


def check_processes(run: Path, train: TrainConfig, count: int) -> None:
    """Checks that so many processes can share the micro-batches of a run's steps equally.

    Args:
        run: The run directory to resume.
        train: The `train` section of its config.
        count: The number of processes that resume it.

    Raises:
        ValueError: They cannot; or inputs.json is missing or damaged.
    """
    total = micro_batches(run, train)
    if total % count:
        fitting = [str(number) for number in range(1, total + 1) if total % number == 0]
        choices = " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))
        raise ValueError(
            f"{run} cannot be resumed by {count} processes: the micro-batches of its steps ({total}) can be divided "
            f"among {choices}"
        )


def shared_among(config: ConfigT, count: int, resume: Path | None) -> ConfigT:
    """The config with the micro-batches that each process accumulates, of a run that others may have started.

    Args:
        config: The config of the run.
        count: The number of processes.
        resume: The run directory to resume; None: a new run, which has its config as it is.

    Returns:
        The config to compute with, and not the one to save; as it is where `check_processes` raises.

    Raises:
        ValueError: inputs.json is missing or damaged.
    """
    if resume is None:
        return config
    train: TrainConfig = config.train  # type: ignore[attr-defined]
    accumulated, rest = divmod(micro_batches(resume, train), count)
    if rest or accumulated == train.gradient_accumulation_steps:
        return config
    return config.model_copy(update={"train": train.model_copy(update={"gradient_accumulation_steps": accumulated})})


def about_processes(run: Path, train: TrainConfig, count: int) -> str:
    """The sentence on a run that is resumed by other processes than started it; empty: as many go on.

    Arguments and errors are those of `check_processes`, which has found nothing.
    """
    started, before = started_with(run, train), train.gradient_accumulation_steps
    if started == count:
        return ""
    accumulated = f"from {before} to {started * before // count}"
    return (
        f"{PROCESSES} changes from {started} to {count}, and train.gradient_accumulation_steps with it {accumulated}: "
        "every step has the same batches and noise, and only its sums are rounded in another order"
    )

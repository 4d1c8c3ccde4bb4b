"""The runs of trainings: they are started, resumed with a changed config, and summed up."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dora_mm.backend import about_layers
from dora_mm.config.adapter import AdapterConfig
from dora_mm.config.commands import resuming, twice_as_long
from dora_mm.config.loader import differing_keys, dump_config
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.schema import PipelineConfig
from dora_mm.config.training import OptimizerConfig, TrainConfig
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.train.checkpoint import Stateful, checkpoints, last_step, load_parts, set_damaged_aside
from dora_mm.train.metrics import read_metrics
from dora_mm.train.processes import by_main_process
from dora_mm.train.resuming import as_written, changed_values, started_config
from dora_mm.train.sharing import CIRCUMSTANCE, MICRO_BATCHES, about_processes, micro_batches, recorded
from dora_mm.train.trackers import chosen_trackers, started
from dora_mm.utils.atomic import append_text, write_text
from dora_mm.utils.circumstances import NOTHING, Record
from dora_mm.utils.folders import is_free
from dora_mm.utils.home import expanded
from dora_mm.utils.lock import LOCK, only_writer
from dora_mm.utils.run_directory import CONFIG, SUMMARY, RunDirectory

log = logging.getLogger(__name__)
CHANGES = "changes.jsonl"  # what a resumed run changed of its config, and after which step
DIVERGED = "diverged.txt"  # what ended a training whose loss or weights were not finite


class DivergedError(ValueError):
    """The loss or a weight is not finite: the same steps with the same rate would end so again."""


@contextlib.contextmanager
def training_run(
    accelerator: Accelerator,
    config: PipelineConfig,
    inputs: Mapping[str, str],
    resume: Path | None,
    train: TrainConfig,
    deciding: Mapping[str, Stateful] = MappingProxyType({}),
) -> Iterator[RunDirectory]:
    """Opens the run directory of a training, and says where it is and how to go on: at the start and at every stop.

    Args:
        accelerator: As in `start_run`; the main process speaks.
        config: The config; in a resumed run it may differ from the saved one, which it then replaces.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        resume: The run directory to resume; None starts a new run.
        train: The `train` section as each process computes it (see `dora_mm.train.sharing`), with the length of the
            training in optimizer steps.
        deciding: What of the checkpoints says whether a resumed run may go on with another config, by name.

    Raises:
        ValueError: See `start_run` and `go_on`; or another process writes to the run, or the steps of the run to resume
            have another number of micro-batches.
    """
    names, steps, count = chosen_trackers(train.track), train.steps, accelerator.num_processes
    if resume is not None and count * train.gradient_accumulation_steps != micro_batches(resume, config.train):  # type: ignore[attr-defined]
        raise ValueError(f"{resume} cannot be resumed: {MICRO_BATCHES} changed since it was started.")
    with contextlib.ExitStack() as writing:
        run = start_run(accelerator, config, inputs, resume)

        def prepare() -> None:
            writing.enter_context(only_writer(run.path))
            if resume is not None:
                go_on(run, config, steps, deciding, {CIRCUMSTANCE: count})
                (run.path / DIVERGED).unlink(missing_ok=True)
            done, values = last_step(run.checkpoints), config.model_dump(mode="json")
            run.trackers = writing.enter_context(started(names, run.path, values, done))

        by_main_process(accelerator, prepare)
        done = last_step(run.checkpoints)
        report = log.info if accelerator.is_main_process else log.debug
        report(
            "%s. After a stop: %s", f"Run {run.path}" + (f", at step {done} of {steps}" if done else ""), resuming(run)
        )
        if resume is not None and (sentence := about_processes(resume, config.train, count)):  # type: ignore[attr-defined]
            report("%s", sentence)
        try:
            yield run
        except BaseException as error:
            done = last_step(run.checkpoints)
            kept = f"saved at step {done} of {steps}" if done else "nothing saved yet"
            how = f"{resuming(run)} --set {lower_rate(config)}" if isinstance(error, DivergedError) else resuming(run)
            report("\nRun %s has stopped, %s. To go on: %s", run.path, kept, how)
            if isinstance(error, DivergedError) and accelerator.is_main_process:
                write_text(run.path / DIVERGED, f"{error}\n")
            raise
        if (done := last_step(run.checkpoints)) < steps:
            longer, early = "evaluate.patience=null", f" early, at step {done} of {steps} (evaluate.patience)"
        else:
            longer, early = twice_as_long(config, steps), ""
        report("\nRun %s is finished%s. To train longer: %s --set %s", run.path, early, resuming(run), longer)


def check_resumed(accelerator: Accelerator, path: Path, inputs: Mapping[str, str]) -> None:
    """Checks that a run can be resumed, before what takes minutes and gigabytes; `training_run` does so again.

    Args:
        accelerator: The main process checks whether another program writes to the run.
        path: The run directory.
        inputs: What is known of its inputs, as for `training_run`.

    Raises:
        ValueError: Another program writes to it, or it was started with other inputs.
    """

    def check_writer() -> None:
        with only_writer(path):
            pass

    by_main_process(accelerator, check_writer)
    RunDirectory.resume(path, inputs)


def finished_run(
    accelerator: Accelerator, path: Path | None, config: PipelineConfig, *results: str
) -> RunDirectory | None:
    """The run to resume, if it has ended with this config, so that nothing is left to do; it then says so.

    Args:
        accelerator: The main process removes what a kill has left behind the last file.
        path: The run directory; None: a new run starts.
        config: The config that it is resumed with.
        results: The names of its files, other than the adapter, that a person may have deleted to have them again.

    Raises:
        ValueError: `inputs.json` is missing or damaged; or another process writes to the run.
    """
    if path is None:
        return None
    run = RunDirectory(path)
    adapters = [run.adapter, *([run.adapter_ema] if getattr(config, "ema", None) else [])]
    there = all((path / name).exists() for name in (SUMMARY, *results))
    if not there or not all(any(folder.rglob("*.safetensors")) for folder in adapters):
        return None
    if changed_values(started_config(path, {config.pipeline: type(config)}), config):
        return None

    def clean() -> None:
        if (path / LOCK).exists():
            with contextlib.suppress(OSError), only_writer(path):  # a copy on a disk that is read-only stays as it is
                pass

    by_main_process(accelerator, clean)
    done = last_step(run.checkpoints)
    patience = getattr(getattr(config, "evaluate", None), "patience", None)
    longer = twice_as_long(config, done) + (" evaluate.patience=null" if patience else "")
    log.info("Run %s is finished: nothing is left to do, and nothing was written.", path)
    log.info("To train longer: %s --set %s", resuming(run), longer)
    return run


def lower_rate(config: PipelineConfig) -> str:
    """The override that lowers the learning rate of a training which has diverged, as far as its optimizer allows."""
    optimizer: OptimizerConfig = config.optimizer  # type: ignore[attr-defined]
    return f"optimizer.lr={max(optimizer.lr / 10, OPTIMIZERS[optimizer.name].least_lr):g}"


def go_on(
    run: RunDirectory, config: PipelineConfig, steps: int, deciding: Mapping[str, Stateful], more: Record = NOTHING
) -> None:
    """Prepares a run to be resumed: its newest intact checkpoint, its config, a warning of other circumstances.

    Args:
        run: The run directory.
        config: The config that it goes on with.
        steps: The length of the training.
        deciding: As in `training_run`.
        more: Circumstances of trainings alone.

    Raises:
        ValueError: No checkpoint is intact, or the run has more than `steps` finished steps, or one of `deciding` does
            not go on with this config.
    """
    set_damaged_aside(run.checkpoints)
    done = last_step(run.checkpoints)
    check_length(run.path, done, steps)
    if done:
        load_parts(checkpoints(run.checkpoints)[-1], deciding)
    change_config(run, config)
    if message := run.go_on(done, {**about_layers(getattr(config, "backend", None)), **more}):
        log.warning(message)


def check_length(path: Path, done: int, steps: int) -> None:
    """Checks that a run can end at this step.

    Raises:
        ValueError: It has finished more.
    """
    if steps < done:
        raise ValueError(f"train.steps: {path} has finished {done} steps, so it cannot end at {steps}")


def change_config(run: RunDirectory, config: PipelineConfig) -> None:
    """Saves the config of a resumed run where it differs from that of its start.

    The changes are recorded in changes.jsonl. The results of a finished run (adapter, contact sheet and summary) move
    to the subfolder step-NNNNNN.

    Args:
        run: The run directory.
        config: The config that it goes on with; see `dora_mm.train.resuming` for what may differ.
    """
    before = started_config(run.path, {config.pipeline: type(config)})
    changes = changed_values(before, config)
    if not changes:
        return
    done = last_step(run.checkpoints)
    if (run.path / SUMMARY).exists():
        _keep_results(run, f"step-{done:06d}")
    rows = [{"step": done, "key": key, "before": old, "after": new} for key, (old, new) in changes.items()]
    append_text(run.path / CHANGES, "".join(json.dumps(row) + "\n" for row in rows))
    run.write_config(dump_config(config), run.inputs)
    for key, (old, new) in changes.items():
        log.info("%s changes from %s to %s", key, as_written(old), as_written(new))


def _keep_results(run: RunDirectory, name: str) -> None:
    """Moves the results of a finished run to a subfolder; one that a kill has left unfinished goes on being filled."""
    numbers = (f"{name}-{number}" for number in range(2, 10_000))
    folder = next(f for f in map(run.path.joinpath, (name, *numbers)) if not (f / SUMMARY).exists())
    folder.mkdir(exist_ok=True)
    results = (run.adapter, run.adapter_ema, run.contact_sheet, run.path / SUMMARY)
    for result in results:  # the summary last: it says that the run is finished
        if result.exists():
            result.rename(folder / result.name)
    log.info("The results so far are in %s", folder)


def start_run(
    accelerator: Accelerator, config: PipelineConfig, inputs: Mapping[str, str], resume: Path | None
) -> RunDirectory:
    """Opens the run directory of a training: a new one, created by the main process, or the one to resume.

    Args:
        accelerator: Tells the other processes of a distributed training which directory was created.
        config: Its resolved text is saved in a new directory.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        resume: The run directory to resume; None starts a new run.

    Raises:
        ValueError: See `RunDirectory.create` and `RunDirectory.resume`.
    """
    if resume is not None:
        return RunDirectory.resume(resume, inputs)
    made: list[Any] = [None]
    if accelerator.is_main_process:
        train: TrainConfig = config.train  # type: ignore[attr-defined]
        count = accelerator.num_processes
        made = [open_run(config, {**inputs, **recorded(train, count)}, {CIRCUMSTANCE: count})]
    return broadcast_object_list(made)[0]


def open_run(config: PipelineConfig, inputs: Mapping[str, str] | None = None, more: Record = NOTHING) -> RunDirectory:
    """Creates a run directory: the config's `output`, or the next number in `runs/<name>`.

    Args:
        config: Its resolved text is saved in the directory.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        more: Circumstances besides those of all runs.

    Raises:
        ValueError: `output` exists already, or its parent is a file.
    """
    output, layers = getattr(config, "output", None), about_layers(getattr(config, "backend", None))
    return RunDirectory.create(config.name, dump_config(config), output, inputs, {**layers, **more})


def reopen_run(
    config: PipelineConfig, inputs: Mapping[str, str], free: Sequence[str] = ("name",)
) -> RunDirectory | None:
    """The run directory that the config's `output` names, to go on in it; None where there is none yet.

    Args:
        config: The config.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        free: The keys of the config that change no result, without `output`, which is always one: a folder may have
            been renamed or copied.

    Raises:
        ValueError: It is no run directory, or that of a run with another config or other inputs.
    """
    output = getattr(config, "output", None)
    folder = expanded(output) if output else None
    if folder is None or is_free(folder):
        return None
    run = RunDirectory(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"output {folder} exists already and is not a run directory: choose another folder.")
    changed = differing_keys(started_config(folder, SCHEMAS), config)
    differing = [key for key in changed if key not in (*free, "output")]
    differing += run.changed_inputs(inputs)
    if differing:
        raise ValueError(
            f"output: {folder} was started with different values of {', '.join(differing)}: choose another folder"
        )
    return run


def check_reopened(config: PipelineConfig, inputs: Mapping[str, str], free: Sequence[str] = ("name",)) -> None:
    """Checks that an evaluation can go on in the run directory of its `output`, before what takes long.

    Args:
        config: The config.
        inputs: What is known of its inputs, as for `evaluation_run`.
        free: See `reopen_run`.

    Raises:
        ValueError: See `evaluation_run`.
    """
    output = getattr(config, "output", None)
    if output and (expanded(output) / CONFIG).is_file() and (run := reopen_run(config, inputs, free)):
        with only_writer(run.path):
            pass


@contextlib.contextmanager
def evaluation_run(
    config: PipelineConfig, inputs: Mapping[str, str], free: Sequence[str] = ("name",)
) -> Iterator[RunDirectory]:
    """Opens the run directory of an evaluation: a new one, or that of the same evaluation, which was stopped.

    Args:
        config: The config.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        free: See `reopen_run`.

    Raises:
        ValueError: See `reopen_run` and `open_run`; or another process writes to the directory.
    """
    run = reopen_run(config, inputs, free) or open_run(config, inputs)
    with only_writer(run.path):
        yield run


def training_summary(
    run: RunDirectory, adapter: AdapterConfig, num_parameters: int, steps: int, **details: Any
) -> dict[str, Any]:
    """The entries of summary.json that every training has, with the last time and loss of metrics.jsonl.

    Args:
        run: The run directory of the finished training.
        adapter: The section of the config.
        num_parameters: The number of trained parameters.
        steps: The number of optimizer steps.
        **details: Further entries, behind the common ones.
    """
    last = read_metrics(run.path / "metrics.jsonl")[-1]
    return {
        "method": adapter.method,
        "rank": adapter.rank,
        "parameters": num_parameters,
        "steps": steps,
        "seconds": round(last["seconds"], 1),
        "loss": round(last["loss"], 4),
        **details,
    }


def write_summary(run: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Writes summary.json and prints the same values as a table."""
    write_text(run.path / SUMMARY, json.dumps(summary, indent=2) + "\n")
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")

"""Run directories: runs/<name>/<NNN>, numbered and never overwritten."""

import contextlib
import json
import logging
import platform
import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dora_mm.config.adapter import AdapterConfig
from dora_mm.config.loader import dump_config, load_config
from dora_mm.config.schema import PipelineConfig
from dora_mm.train.checkpoint import last_step
from dora_mm.train.metrics import read_metrics
from dora_mm.train.resuming import changed_values
from dora_mm.utils import yaml12
from dora_mm.utils.atomic import PARTIAL, remove_partial_files, write_text
from dora_mm.utils.folders import claim_number

log = logging.getLogger(__name__)
REPORTED_PACKAGES = ("dora_mm", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")

CONFIG, INPUTS = "config.yaml", "inputs.json"
PROCESSES = "the number of processes"  # an input like the data, since each takes a batch of its own
CHANGES = "changes.jsonl"  # what a resumed run changed of its config, and after which step
SUMMARY = "summary.json"  # the last file that a training writes, so it marks a finished one


class RunDirectory:
    """The folder that holds everything one run writes.

    Attributes:
        path: The folder itself.
        checkpoints: The folder of checkpoints.
        adapter: The folder of the final adapter.
        samples: The folder of sampled images.
        sheet: The contact sheet, a PNG file.
    """

    def __init__(self, path: Path):
        self.path = path

    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    samples = property(lambda self: self.path / "samples")
    sheet = property(lambda self: self.path / "sheet.png")

    @classmethod
    def create(
        cls,
        name: str,
        config_text: str,
        output: str | None = None,
        root: Path = Path("runs"),
        inputs: Mapping[str, str] | None = None,
    ) -> "RunDirectory":
        """Creates a run directory that holds the resolved config and the versions of the software.

        Args:
            name: The name of the run; without `output`, the directory is the next number in `root`/`name`.
            config_text: The resolved config as YAML.
            output: The directory to create instead.
            root: The folder of all numbered runs.
            inputs: Digests of the data and models that the config refers to, by a description of each.

        Raises:
            ValueError: `output` exists already, or its parent is a file.
        """
        path = new_folder(name, output, root)
        _write_about(path, config_text, dict(inputs or {}))
        return cls(path)

    @classmethod
    def resume(cls, path: Path, inputs: Mapping[str, str] | None = None) -> "RunDirectory":
        """Opens the directory of an existing run.

        Args:
            path: The run directory.
            inputs: The current digests, as given to `create`.

        Raises:
            ValueError: `path` is not a run directory, or the run was started with different `inputs`.
        """
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} is not a run directory: it has no {CONFIG}.")
        run = cls(path)
        if changed := run.changed_inputs(inputs or {}):
            raise ValueError(f"{path} cannot be resumed: {' and '.join(changed)} changed since it was started.")
        return run

    def changed_inputs(self, inputs: Mapping[str, str]) -> list[str]:
        """The descriptions of the inputs whose digest differs from the one that the run was started with."""
        before = json.loads((self.path / INPUTS).read_text()) if inputs else {}
        return [name for name, digest in inputs.items() if before.get(name) != digest]

    def stage(self, name: str) -> "RunDirectory":
        """Creates a subfolder, with separate checkpoints and metrics, for one stage of a run that has several."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name)


@contextlib.contextmanager
def training_run(
    accelerator: Accelerator, config: PipelineConfig, inputs: Mapping[str, str], resume: Path | None, steps: int
) -> Iterator[RunDirectory]:
    """Opens the run directory of a training, and says where it is and how to go on: at the start and at every stop.

    Args:
        accelerator: As in `start_run`; the main process speaks.
        config: The config; in a resumed run it may differ from the saved one, which it then replaces.
        inputs: Digests of the data and models that the config refers to, by a description of each.
        resume: The run directory to resume; None starts a new run.
        steps: The length of the training in optimizer steps.

    Raises:
        ValueError: See `start_run`; or the run to resume has more than `steps` finished steps, or was started with
            another number of processes, and so with other batches.
    """
    inputs = {**inputs, PROCESSES: str(accelerator.num_processes)}
    run = start_run(accelerator, config, inputs, resume)
    done = last_step(run.checkpoints)
    if steps < done:
        raise ValueError(f"train.steps: {run.path} has finished {done} steps, so it cannot end at {steps}")
    say = log.info if accelerator.is_main_process else log.debug
    if accelerator.is_main_process and resume is not None:
        change_config(run, config)
    say("%s. After a stop: %s", f"Run {run.path}" + (f", at step {done} of {steps}" if done else ""), resuming(run))
    try:
        yield run
    except BaseException:
        done = last_step(run.checkpoints)
        kept = f"saved at step {done} of {steps}" if done else "nothing saved yet"
        say("\nRun %s has stopped, %s. To go on: %s", run.path, kept, resuming(run))
        raise
    say("\nRun %s is finished. To train longer: %s --set %s", run.path, resuming(run), twice_as_long(config, steps))


def twice_as_long(config: PipelineConfig, steps: int) -> str:
    """The override that doubles the length of a training."""
    epochs = getattr(getattr(config, "train", None), "epochs", None)
    return f"train.epochs={2 * epochs}" if epochs else f"train.steps={2 * steps}"


def resuming(run: RunDirectory) -> str:
    """The command that resumes a run."""
    return f"dora-mm train --resume {shlex.quote(str(run.path))}"


def change_config(run: RunDirectory, config: PipelineConfig) -> None:
    """Saves the config of a resumed run where it differs from that of its start.

    The changes are recorded in changes.jsonl. The results of a finished run (adapter, sheet and summary) move to the
    subfolder step-NNNNNN.

    Args:
        run: The run directory.
        config: The config that it goes on with; see `dora_mm.train.resuming` for what may differ.
    """
    before = load_config(run.path / CONFIG, schemas={config.pipeline: type(config)})
    changes = changed_values(before, config)
    if not changes:
        return
    done = last_step(run.checkpoints)
    if (run.path / SUMMARY).exists():
        _keep_results(run, f"step-{done:06d}")
    rows = [{"step": done, "key": key, "before": old, "after": new} for key, (old, new) in changes.items()]
    with (run.path / CHANGES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    write_text(run.path / CONFIG, dump_config(config))
    for key, (old, new) in changes.items():
        log.info("%s changes from %s to %s", key, old, new)


def _keep_results(run: RunDirectory, name: str) -> None:
    """Moves the results of a finished run to a subfolder; one that a kill has left unfinished goes on being filled."""
    numbers = (f"{name}-{number}" for number in range(2, 10_000))
    folder = next(f for f in map(run.path.joinpath, (name, *numbers)) if not (f / SUMMARY).exists())
    folder.mkdir(exist_ok=True)
    for result in (run.adapter, run.sheet, run.path / SUMMARY):  # the summary last: it says that the run is finished
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
        made = [open_run(config, inputs)]
    return broadcast_object_list(made)[0]


def open_run(config: PipelineConfig, inputs: Mapping[str, str] | None = None) -> RunDirectory:
    """Creates a run directory: the config's `output`, or the next number in `runs/<name>`.

    Args:
        config: Its resolved text is saved in the directory.
        inputs: Digests of the data and models that the config refers to, by a description of each.

    Raises:
        ValueError: `output` exists already, or its parent is a file.
    """
    return RunDirectory.create(config.name, dump_config(config), getattr(config, "output", None), inputs=inputs)


def existing_run(config: PipelineConfig, resume: Path | None = None) -> Path | None:
    """Finds the run directory that a job goes on in: the one to resume, or the config's `output` where it exists.

    Args:
        config: The config.
        resume: The run directory to go on with; None: `output`, or a new directory.

    Returns:
        The directory; None where a new one is needed.

    Raises:
        ValueError: The directory holds something else than a run of this pipeline.
    """
    path = resume or Path(getattr(config, "output", None) or "").expanduser()
    if path == Path() or not path.exists():
        return None
    saved = path / "config.yaml"
    if saved.is_file():
        pipeline = yaml12.read(saved.read_text(encoding="utf-8")).value["pipeline"]
        if pipeline != config.pipeline:
            raise ValueError(f"{path} is a run of {pipeline}, not of {config.pipeline}: choose another folder")
    elif not path.is_dir() or any(
        entry.name not in ("versions.json", INPUTS) and entry.suffix != PARTIAL for entry in path.iterdir()
    ):
        raise ValueError(f"output {path} exists already and is not a run directory: choose another folder")
    return path


@contextlib.contextmanager
def picture_run(config: PipelineConfig, path: Path | None) -> Iterator[RunDirectory]:
    """Opens the run directory of a job of pictures, and says how to go on: at the start and at every stop.

    Args:
        config: The config. Where it differs from the one in the directory, it replaces that.
        path: The directory that `existing_run` has found; None creates one.
    """
    if path is None:
        run = open_run(config)
    else:
        run = RunDirectory(path)
        remove_partial_files(path)
        _write_about(path, dump_config(config), {})
    go_on = f"dora-mm {config.command} --resume {shlex.quote(str(run.path))}"
    log.info("Run %s. After a stop: %s", run.path, go_on)
    try:
        yield run
    except BaseException:
        log.info("\nRun %s has stopped; its pictures so far are kept. To go on: %s", run.path, go_on)
        raise


def new_folder(name: str, output: str | None = None, root: Path = Path("runs")) -> Path:
    """Creates a folder: `output`, or the next number in `root`/`name`.

    Raises:
        ValueError: `output` exists already, or its parent is a file.
    """
    return _claim(Path(output).expanduser()) if output is not None else claim_number(root / name)


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


def _write_about(path: Path, config_text: str, inputs: Mapping[str, str]) -> None:
    write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
    write_text(path / INPUTS, json.dumps(inputs, indent=2) + "\n")
    write_text(path / "config.yaml", config_text)  # last, because this file marks the folder as a run directory


def _claim(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"output {path} exists already: choose another folder, or leave output out to get a numbered one."
        ) from None
    except NotADirectoryError:
        raise ValueError(f"output {path} is inside a file, not a folder: choose another folder.") from None
    except FileNotFoundError:  # its parents were made, so this is a place such as /proc, where there are no new folders
        raise ValueError(f"output {path} cannot be made there: choose another folder.") from None
    return path


def versions() -> dict[str, Any]:
    """The versions of Python and of the packages that affect results, and the machine. None: not installed."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # includes the build, such as +cu130, which the package metadata omits
    return found

"""Run directories: runs/<name>/<NNN>, numbered, never overwritten."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dora_mm.config.loader import dump_config
from dora_mm.config.schema import PipelineConfig
from dora_mm.utils.atomic import write_text

REPORTED_PACKAGES = ("dora_mm", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")

INPUTS = "inputs.json"


class RunDirectory:
    """One run's folder. Everything that the run writes lies in it."""

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
        """A new folder with the resolved config and the versions in it: `output`, or the next number of `name`.

        Args:
            inputs: digests, by what they are of, of the files that the config only names.

        Raises:
            ValueError: `output` exists, or lies below a file.
        """
        path = _claim(Path(output).expanduser()) if output is not None else _claim_number(root / name)
        write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        write_text(path / INPUTS, json.dumps(dict(inputs or {}), indent=2) + "\n")
        write_text(path / "config.yaml", config_text)  # last: it is what makes the folder a run
        return cls(path)

    @classmethod
    def resume(cls, path: Path, inputs: Mapping[str, str] | None = None) -> "RunDirectory":
        """An existing run's folder.

        Raises:
            ValueError: there is no run in it, or one that was started with other `inputs`.
        """
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run directory: it holds no config.yaml.")
        run = cls(path)
        if changed := run.changed(inputs or {}):
            raise ValueError(f"{path} cannot go on: since it was started, {' and '.join(changed)} have changed.")
        return run

    def changed(self, inputs: Mapping[str, str]) -> list[str]:
        """Which of the inputs are others than those that the run was started with."""
        before = json.loads((self.path / INPUTS).read_text()) if inputs else {}
        return [name for name, digest in inputs.items() if before.get(name) != digest]

    def stage(self, name: str) -> "RunDirectory":
        """A folder inside it for one stage of a run that has several, with checkpoints and metrics of its own."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name)


def start_run(
    accelerator: Accelerator, config: PipelineConfig, inputs: Mapping[str, str], resume: Path | None
) -> RunDirectory:
    """One folder for all processes, made by the first; or the one that is gone on with."""
    if resume is not None:
        return RunDirectory.resume(resume, inputs)
    made: list[Any] = [None]
    if accelerator.is_main_process:
        made = [open_run(config, inputs)]
    return broadcast_object_list(made)[0]


def open_run(config: PipelineConfig, inputs: Mapping[str, str] | None = None) -> RunDirectory:
    """A new run directory: the config's `output`, or the next number of `runs/<name>`. Raises as RunDirectory.create.

    Args:
        config: Its resolved text is saved in the folder.
        inputs: Digests, by what they are of, of the files that the config only names.
    """
    return RunDirectory.create(config.name, dump_config(config), getattr(config, "output", None), inputs=inputs)


def write_summary(run: RunDirectory, summary: Mapping[str, Any]) -> None:
    """summary.json, and the same as a table on the screen."""
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")


def _claim(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"output {path} exists: name another folder, or leave output out for a numbered one."
        ) from None
    except NotADirectoryError:
        raise ValueError(f"output {path} lies below a file: name another folder.") from None
    return path


def _claim_number(parent: Path) -> Path:
    """Creating the folder is the claim: two runs that start together get two numbers."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0) + 1
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def versions() -> dict[str, Any]:
    """What ran: the packages that decide the numbers, Python and the machine."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build, which the package's version leaves out: +cu130
    return found

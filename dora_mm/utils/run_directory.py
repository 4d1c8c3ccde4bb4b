"""Run directories: runs/<name>/<NNN>, numbered and never overwritten."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dora_mm.utils import yaml12
from dora_mm.utils.atomic import write_text
from dora_mm.utils.folders import new_folder
from dora_mm.utils.json_text import read_json
from dora_mm.utils.lock import check_lock

MODEL, WEIGHTS_OF = "the model", "the weights of "  # inputs: the files of a model, and the start of names of weights
CONFIG, INPUTS, VERSIONS = "config.yaml", "inputs.json", "versions.json"
WEIGHTS_IN_HEADERS = {"base_digest": "the weights of the model", "vision_digest": "the vision tower"}  # keys of both
DAY = "day"  # in inputs.json: that on which the run began, of models whose chat templates may ask; it is not compared
SUMMARY = "summary.json"  # the last file that a training writes, its page included, so it marks a finished one
SAMPLE_NOW, SAVE_NOW = "sample-now", "save-now"  # files by which a person asks a training for a sheet, or a checkpoint
REPORTED_PACKAGES = ("dora_mm", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


class RunDirectory:
    """The folder that holds everything one run writes.

    Attributes:
        path: The folder itself.
        checkpoints: The folder of checkpoints.
        adapter: The folder of the final adapter.
        samples: The folder of sampled images.
        sheet: The contact sheet, a PNG file: pictures of the bare model, of the adapter, and of the average.
        adapter_ema: The folder of the average of the adapters of all steps.
        trackers: What metrics are also shown by, such as TensorBoard; see `dora_mm.train.trackers`.
        prefix: What the names of metrics begin with there, of the stage of a run.
    """

    def __init__(self, path: Path, trackers: Sequence[Any] = (), prefix: str = ""):
        self.path, self.trackers, self.prefix = path, trackers, prefix

    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    samples = property(lambda self: self.path / "samples")
    sheet = property(lambda self: self.path / "sheet.png")
    adapter_ema = property(lambda self: self.path / "adapter-ema")

    @classmethod
    def create(
        cls,
        name: str,
        config_text: str,
        output: str | None = None,
        inputs: Mapping[str, str] | None = None,
        software: Mapping[str, str] | None = None,
    ) -> "RunDirectory":
        """Creates a run directory, which appears with the resolved config and the versions of the software.

        Args:
            name: The name of the run; without `output`, the directory is the next number in runs/`name`.
            config_text: The resolved config as YAML.
            output: The directory to create instead.
            inputs: Digests of the data and models that the config refers to, by a description of each.
            software: What `versions` does not know of the software.

        Raises:
            ValueError: `output` exists already, or its parent is a file.
        """

        def fill(folder: Path) -> None:
            cls(folder).write_about(config_text, inputs or {}, software or {})

        return cls(new_folder(name, output, fill))

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

    def write_about(self, config_text: str, inputs: Mapping[str, str], software: Mapping[str, str]) -> None:
        """Writes the resolved config, the versions of the software and the digests of the inputs.

        The config is also one of the inputs, by which `config.yaml` is compared: a person may edit that.
        """
        write_text(self.path / VERSIONS, json.dumps({**versions(), **software}, indent=2) + "\n")
        self.write_config(config_text, inputs)

    def write_config(self, config_text: str, inputs: Mapping[str, Any]) -> None:
        """Writes the resolved config and the inputs."""
        about = {**inputs, CONFIG: yaml12.read(config_text).value}
        write_text(self.path / INPUTS, json.dumps(about, indent=2) + "\n")
        write_text(self.path / CONFIG, config_text)  # last, because this file marks the folder as a run directory

    @property
    def inputs(self) -> dict[str, Any]:
        """What the run was started with: the values of its config by "config.yaml", and digests of all else.

        Raises:
            ValueError: The file is missing or damaged.
        """
        file = self.path / INPUTS
        try:
            found = read_json(file)
            if isinstance(found.get(CONFIG), dict):
                return found
            problem = "it does not say what config the run was started with"
        except ValueError as error:
            problem = str(error)
        raise ValueError(f"{file} is missing or damaged ({problem}): the run cannot go on without it.")

    def changed_inputs(self, inputs: Mapping[str, Any]) -> list[str]:
        """The descriptions of the inputs that are not those that the run was started with; each file of a model is one.

        Args:
            inputs: Some of the inputs. What runs of before did not record of a model is not compared.
        """
        before = self.inputs if inputs else {}
        if MODEL not in before:
            inputs = {name: now for name, now in inputs.items() if name != MODEL and not name.startswith(WEIGHTS_OF)}
        changed = []
        for name, now in inputs.items():
            if name == MODEL:
                changed += [f"{file} of {MODEL}" for file in changed_names(before[MODEL], now)]
            elif name != DAY and before.get(name) != now:
                changed.append(WEIGHTS_IN_HEADERS.get(name, name))
        return changed

    def changed_versions(self, software: Mapping[str, str]) -> list[str]:
        """What of the software is not as it was when the run was started, such as "torch 2.12.0 is 2.13.0".

        Args:
            software: As given to `create`.
        """
        try:
            before = read_json(self.path / VERSIONS)
        except ValueError as error:
            return [f"{VERSIONS} cannot be read ({error})"]
        now = {**versions(), **software}
        return [f"{name} {before.get(name)} is {now.get(name)}" for name in now if before.get(name) != now[name]]

    def stage(self, name: str) -> "RunDirectory":
        """Creates a subfolder, with separate checkpoints and metrics, for one stage of a run that has several."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name, self.trackers, f"{name}/")

    @contextmanager
    def answering(self, request: str) -> Iterator[bool]:
        """A context that does what a person asks for while the run goes on: `touch RUN/<request>`.

        Yields:
            Whether that is asked for. The file goes at the end, so that a request is answered after an interruption.
        """
        file = self.path / request
        asked = file.exists()
        yield asked
        if asked:
            check_lock(file)
            file.unlink(missing_ok=True)


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that only one of them has."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def versions() -> dict[str, Any]:
    """The versions of Python and of the packages that affect results, the machine and its threads. None: not there."""
    import torch  # here: folders are also claimed by what computes nothing

    from dora_mm.utils.devices import hardware_name

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": hardware_name(),
        "threads": torch.get_num_threads(),
    }
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # includes the build, such as +cu130, which the package metadata omits
    found["threads"] = torch.get_num_threads()  # sums are divided among them, and rounded in another order
    return found

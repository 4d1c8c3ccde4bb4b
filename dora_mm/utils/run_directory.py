"""Run directories: runs/<name>/<NNN>, numbered and never overwritten."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from dora_mm.utils import yaml12
from dora_mm.utils.atomic import write_text
from dora_mm.utils.circumstances import NOTHING, Record, about_kept, circumstances
from dora_mm.utils.folders import new_folder
from dora_mm.utils.json_text import read_json
from dora_mm.utils.lock import check_lock
from dora_mm.utils.messages import shown

log = logging.getLogger(__name__)
MODEL, WEIGHTS_OF = "files of the model", "the weights of "  # in inputs.json: a key, and the start of further ones
WEIGHTS_IN_HEADERS = {"base_digest": "the weights of the model", "vision_digest": "the vision tower"}  # keys of both
DAY = "day"  # in inputs.json: that on which the run began, of models whose chat templates may ask; it is not compared
CONFIG, INPUTS = "config.yaml", "inputs.json"
VERSIONS = "versions.json"  # the circumstances of the start
CONTINUED = "circumstances.json"  # those of continuations, by the number of the steps before them
SUMMARY = "summary.json"  # the last file that a training writes, its page included, so it marks a finished one
SAMPLE_NOW, SAVE_NOW = (
    "sample-now",
    "save-now",
)  # files by which a person asks a training for a contact sheet, or a checkpoint


class RunDirectory:
    """The folder that holds everything one run writes.

    Attributes:
        path: The folder itself.
        checkpoints: The folder of checkpoints.
        adapter: The folder of the final adapter.
        samples: The folder of sampled images.
        contact_sheet: The contact sheet, a PNG file: images of the bare model, of the adapter, and of the average.
        adapter_ema: The folder of the average of the adapters of all steps.
        trackers: What metrics are also shown by, such as TensorBoard; see `dora_mm.train.trackers`.
        prefix: What the names of metrics begin with there, of the stage of a run.
    """

    def __init__(self, path: Path, trackers: Sequence[Any] = (), prefix: str = ""):
        self.path, self.trackers, self.prefix = path, trackers, prefix

    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    samples = property(lambda self: self.path / "samples")
    contact_sheet = property(lambda self: self.path / "sheet.png")
    adapter_ema = property(lambda self: self.path / "adapter-ema")

    @classmethod
    def create(
        cls,
        name: str,
        config_text: str,
        output: str | None = None,
        inputs: Mapping[str, str] | None = None,
        layers: Record = NOTHING,
    ) -> "RunDirectory":
        """Creates a run directory, which appears with the resolved config and the circumstances of its start.

        Args:
            name: The name of the run; without `output`, the directory is the next number in runs/`name`.
            config_text: The resolved config as YAML.
            output: The directory to create instead.
            inputs: Digests of the data and models that the config refers to, by a description of each.
            layers: What runs the adapted layers: `backend.about_layers`.

        Raises:
            ValueError: `output` exists already, or its parent is a file.
        """

        def fill(folder: Path) -> None:
            write_text(folder / VERSIONS, json.dumps(circumstances(layers), indent=2) + "\n")
            cls(folder).write_config(config_text, inputs or {})

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

    def write_config(self, config_text: str, inputs: Mapping[str, Any]) -> None:
        """Writes the resolved config and the digests of the inputs.

        The config is also one of the inputs, by which `config.yaml` is compared: a person may edit that.
        """
        about = {**inputs, CONFIG: yaml12.read(config_text).value}
        write_text(self.path / INPUTS, json.dumps(about, indent=2) + "\n")
        write_text(self.path / CONFIG, config_text)  # last, because this file marks the folder as a run directory

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs that the run was started with: the values of its config by "config.yaml", and digests of all else.

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
        """The descriptions of those of some inputs that are not as the run was started with."""
        if not inputs:
            return []
        before = self.inputs
        if MODEL in inputs and not isinstance(before.get(MODEL), Mapping):
            sentence = "%s was started by a release that did not record each file of a model: these are not compared"
            log.warning(sentence, self.path)
        return differing_inputs(before, inputs)

    def circumstances(self) -> dict[int, Record]:
        """The circumstances of the steps, by the number of the first of them, from 0; in ascending order.

        Raises:
            ValueError: A file of them is missing or damaged.
        """
        file = self.path / CONTINUED
        found = {"0": read_json(self.path / VERSIONS), **(read_json(file) if file.exists() else {})}
        if wrong := [step for step, record in found.items() if not (step.isdecimal() and isinstance(record, dict))]:
            raise ValueError(f"{file} has no circumstances of a step under {shown(wrong[0])}")
        return dict(sorted((int(step), record) for step, record in found.items()))

    def go_on(self, done: int, layers: Record = NOTHING) -> str:
        """Records the circumstances of a continuation where they are not those of the last finished step.

        Args:
            done: The number of finished steps.
            layers: As given to `create`.

        Returns:
            A sentence on the finished steps that were computed under others; empty: none was.
        """
        now = circumstances(layers)
        try:
            before, problem = self.circumstances(), ""
        except ValueError as error:
            before, problem = {0: NOTHING}, f"The circumstances of the finished steps are not known: {error}"
            if (file := self.path / CONTINUED).exists():
                file.rename(file.with_name(f"damaged-{CONTINUED}"))  # what of it can be read stays
        finished = {step: record for step, record in before.items() if step < done}
        counts = (last - first for first, last in pairwise([*finished, done]))
        message = problem or about_kept(zip(finished.values(), counts, strict=True), now, "finished steps")
        after = finished if finished and finished[max(finished)] == now else {**finished, done: now}
        if after != before:
            write_text(
                self.path / CONTINUED,
                json.dumps({step: after[step] for step in after if step or not done}, indent=2) + "\n",
            )
        return message

    def stage(self, name: str) -> "RunDirectory":
        """Creates a subfolder, with separate checkpoints and metrics, for one stage of a run that has several."""
        (self.path / name).mkdir(exist_ok=True)
        return RunDirectory(self.path / name, self.trackers, f"{name}/")

    @contextmanager
    def answering(self, request: str) -> Iterator[bool]:
        """A context in which a request to a running run is served: `touch RUN/<request>`.

        Yields:
            Whether the file exists. It is deleted at the end, so that a request survives an interruption.
        """
        file = self.path / request
        requested = file.exists()
        yield requested
        if requested:
            check_lock(file)
            file.unlink(missing_ok=True)


def differing_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The descriptions of the inputs that differ, in words; each file of a model is one.

    Args:
        before: The inputs of a run, or of answers. Parts of a model that these lack are not compared.
        now: Some of the inputs.
    """
    if not isinstance(before.get(MODEL), Mapping):
        now = {name: value for name, value in now.items() if name != MODEL and not name.startswith(WEIGHTS_OF)}
    changed = []
    for name, value in now.items():
        if name == MODEL:
            changed += [f"{file} of the model" for file in changed_names(before[MODEL], value)]
        elif name != DAY and before.get(name) != value:
            changed.append(WEIGHTS_IN_HEADERS.get(name, name))
    return changed


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or that only one of them has."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]

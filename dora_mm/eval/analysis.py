"""What runs, adapter files and fine-tuned models did to the weights of their base, read one weight at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dora_mm.config.comparing import CompareConfig
from dora_mm.config.loader import load_config, resolve_adapter, resolve_model
from dora_mm.eval.decomposition import WeightPoint, method_of, weight_change
from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.algebra.exact import fitted, new_weight
from dora_mm.formats.commands.extract import changed_modules, check_same_architecture
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import LayerReader

_TRAINING = re.compile(r"(?P<variant>.+)-lr(?P<rate>[^-]+(-\d+)?)-seed(?P<seed>\d+)")  # a run of a campaign
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class TrainedSource:
    """One thing that was trained, at one time.

    Attributes:
        run: The name of the run, or of the file.
        path: An adapter file, or a model.
        base: The model that it was trained from; None where nothing says it.
        step: The optimizer steps of the checkpoint; None where it is none.
        score: The score of the run in its campaign.
        is_model: Whether it is a fine-tuned model.
    """

    run: str
    path: Path
    base: str | None
    step: int | None = None
    score: float | None = None
    is_model: bool = False


def find_sources(path: str, base: str | None = None) -> list[TrainedSource]:
    """What a path of the command line stands for.

    Args:
        path: A run directory, whose kept checkpoints are taken, and its adapter where it has kept none; the folder of
            a campaign, whose runs are; an adapter file of any tool or its folder; or a fine-tuned model.
        base: The base model; None: that of the run's config.

    Raises:
        ValueError: There is no such path, it holds nothing that was trained, or its base model is not known.
    """
    folder = Path(path)
    if (folder / "rates").is_dir() and (folder / "runs").is_dir():
        runs = sorted(run for run in (folder / "runs").iterdir() if (run / "config.yaml").is_file())
        found = [source for run in runs for source in _of_run(run, base, _score(folder, run.name))]
        if not found:
            raise ValueError(f"{path} is a campaign without a finished training")
        return found
    if (folder / "config.yaml").is_file():
        return _of_run(folder, base)
    if base is None:
        raise ValueError(f"{path}: give its base model with --base")
    found = resolve_adapter(path, "RUN")
    try:
        return [TrainedSource(folder.name, AdapterFile(found).path, base)]
    except ValueError as error:
        try:
            BaseWeights.open(found)
        except ValueError:
            raise error from None
        return [TrainedSource(folder.name, found, base, is_model=True)]


def _of_run(run: Path, base: str | None, score: float | None = None) -> list[TrainedSource]:
    config = load_config(run / "config.yaml")
    base = base or getattr(getattr(config, "model", None), "path", None)
    kept = [(step, folder) for folder in (run / "checkpoints").glob("step-*") if (step := _step(folder.name))]
    files = [(step, AdapterFile(folder).path) for step, folder in sorted(kept)]
    if not files:
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise ValueError(f"{run} has neither checkpoints nor an adapter")
        files = [(None, AdapterFile(adapter).path)]
    return [TrainedSource(run.name, file, base, step, score) for step, file in files]


def _step(name: str) -> int | None:
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def _score(campaign: Path, run: str) -> float | None:
    """The score that a run was chosen by, or not; None for the further seeds, which were not used for choosing."""
    config, found = load_config(campaign / "config.yaml"), _TRAINING.fullmatch(run)
    if not isinstance(config, CompareConfig) or found is None or int(found["seed"]) != config.seeds[0]:
        return None
    values = campaign / "rates" / f"{found['variant']}.json"
    return json.loads(values.read_text()).get(found["rate"]) if values.is_file() else None


def read_points(source: TrainedSource, modules: re.Pattern[str] | None = None) -> list[WeightPoint]:
    """DM and dD of all matrices that were trained, or of those whose name a pattern matches in full.

    Raises:
        ValueError: A file cannot be read, or is not of this base model; or no matrix is left.
    """
    if source.base is None:
        raise ValueError(f"{source.path} does not say its base model: give it with --base")
    base = BaseWeights.open(resolve_model(source.base, "--base"))
    points = list((_of_model if source.is_model else _of_adapter)(source, base, modules))
    if not points:
        problem = "no trained matrix has such a name" if modules else f"no matrix differs from {source.base}"
        raise ValueError(f"{source.path}: {problem}")
    return points


def _of_adapter(source: TrainedSource, base: BaseWeights, modules: re.Pattern[str] | None) -> Iterator[WeightPoint]:
    reader = LayerReader(source.path, base, whole=True)
    names = [name for name in reader.names() if _is_wanted(name, modules)]
    for name in tqdm(names, source.run, unit="matrix", delay=2, disable=None):
        with located(f"{source.path}: {name}"):
            layer, W0 = reader.layer(name), reader.base(name)
            if W0.dim() < 2:
                continue
            dM, dD = weight_change(new_weight(fitted(layer, W0), W0), W0)
        yield WeightPoint(method_of(layer.spec), source.run, source.step, str(name), dM, dD, source.score)


def _of_model(source: TrainedSource, base: BaseWeights, modules: re.Pattern[str] | None) -> Iterator[WeightPoint]:
    tuned = BaseWeights.open(source.path)
    check_same_architecture(tuned, base)
    for name in changed_modules(tuned, base)[0]:
        if _is_wanted(name, modules):
            dM, dD = weight_change(tuned[name], base[name])
            yield WeightPoint("full", source.run, source.step, str(name), dM, dD, source.score)


def _is_wanted(name: Name, modules: re.Pattern[str] | None) -> bool:
    return modules is None or modules.fullmatch(str(name)) is not None

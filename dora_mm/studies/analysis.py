"""Weight changes of runs, adapter files and fine-tuned models against their base, read one weight at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_mm.config.loader import load_config
from dora_mm.config.paths import resolve_adapter, resolve_model
from dora_mm.eval.gradients import method_of
from dora_mm.formats.adapter_file import AdapterFile, located
from dora_mm.formats.algebra.exact import fitted, new_weight
from dora_mm.formats.commands.extract import changed_modules, check_same_architecture
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import LayerReader
from dora_mm.studies.decomposition import WeightPoint, weight_change
from dora_mm.train.checkpoint import checkpoints, step_of
from dora_mm.utils.json_text import read_json
from dora_mm.utils.progress import tracked

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # of transformers 5
_TRANSPOSED = "layers of GPT-2's kind (Conv1D) keep their weights as (inputs, outputs)"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedSource:
    """One thing that was trained, at one time.

    Attributes:
        run: The path of the run, or of the file.
        path: An adapter file, or a model.
        base: The model that it was trained from; None where nothing says it.
        revision: The revision of `base` on the hub.
        step: The optimizer steps of the checkpoint; None where it is none.
        score: The score of the run in its comparison.
        is_model: Whether it is a fine-tuned model.
    """

    run: str
    path: Path
    base: str | None
    step: int | None = None
    score: float | None = None
    is_model: bool = False
    revision: str | None = None


def find_sources(path: str, base: str | None = None, scores: Mapping[str, float] | None = None) -> list[TrainedSource]:
    """The trained sources that a path of the command line stands for.

    Args:
        path: A run directory, whose kept checkpoints are taken, and its adapter where it has kept none; the folder of
            a comparison, whose finished runs are; an adapter file of any tool or its folder; or a fine-tuned model.
        base: The base model; None: that of the run's config.
        scores: Of the runs of a comparison, by their names.

    Raises:
        ValueError: There is no such path, it holds nothing that was trained, or its base model is not known.
    """
    folder = Path(path)
    if (folder / "config.yaml").is_file() and (folder / "runs").is_dir():
        runs = sorted(run for run in (folder / "runs").iterdir() if (run / "config.yaml").is_file())
        finished = [run for run in runs if (run / "adapter").is_dir()]
        if left_out := len(runs) - len(finished):
            log.warning("%s: %d of %d trainings are not finished or have diverged: left out", path, left_out, len(runs))
        if not finished:
            raise ValueError(f"{path} is a comparison without a finished training that is still here")
        return [source for run in finished for source in _of_run(run, base, (scores or {}).get(run.name))]
    if (folder / "config.yaml").is_file():
        return _of_run(folder, base)
    if base is None:
        raise ValueError(f"{path}: give its base model with --base")
    found = resolve_adapter(path, "RUN")
    try:
        return [TrainedSource(path, AdapterFile(found).path, base)]
    except ValueError as error:
        try:
            BaseWeights.open(found)
        except ValueError:
            raise error from None
        return [TrainedSource(path, found, base, is_model=True)]


def _of_run(run: Path, base: str | None, score: float | None = None) -> list[TrainedSource]:
    config = load_config(run / "config.yaml")
    model, revision = getattr(config, "model", None), None
    if base is None:
        base, revision = getattr(model, "path", None), getattr(model, "revision", None)
    # Those of a schedule-free optimizer are left out: its result is not the point it trains at.
    is_averaged = getattr(getattr(config, "optimizer", None), "name", None) == "schedule_free"
    kept = [] if is_averaged else checkpoints(run / "checkpoints")
    files = [(step_of(folder), AdapterFile(folder).path) for folder in kept]
    if not files:
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise ValueError(f"{run} has neither checkpoints nor an adapter")
        files = [(None, AdapterFile(adapter).path)]
    return [TrainedSource(str(run), file, base, step, score, revision=revision) for step, file in files]


def distinct_names(sources: Sequence[TrainedSource]) -> list[TrainedSource]:
    """The sources with the shortest ends of their paths that tell all runs apart, instead of the paths.

    Raises:
        ValueError: A path was given twice.
    """
    paths = [Path(source.path).resolve() for source in sources]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice")
    runs = list(dict.fromkeys(Path(source.run).resolve() for source in sources))
    names = {run: run.as_posix() for run in runs}
    for length in range(max(len(run.parts) for run in runs), 0, -1):
        shorter = {run: "/".join(run.parts[-length:]) for run in runs}
        if len(set(shorter.values())) == len(runs):
            names = shorter
    return [replace(source, run=names[Path(source.run).resolve()]) for source in sources]


def read_points(source: TrainedSource, modules: re.Pattern[str] | None = None) -> list[WeightPoint]:
    """DM and dD of all matrices that were trained, or of those whose name a pattern matches in full.

    Raises:
        ValueError: A file cannot be read, or is not of this base model; or no matrix is left.
    """
    if source.base is None:
        raise ValueError(f"{source.path} does not say its base model: give it with --base")
    base = BaseWeights.open(resolve_model(source.base, "--base (of a run: model.path)"), source.revision)
    points = list((_of_model if source.is_model else _of_adapter)(source, base, modules))
    if not points:
        problem = "no trained matrix has such a name" if modules else f"no matrix differs from {source.base}"
        raise ValueError(f"{source.path}: {problem}")
    return points


def _of_adapter(source: TrainedSource, base: BaseWeights, modules: re.Pattern[str] | None) -> Iterator[WeightPoint]:
    reader = LayerReader(source.path, base, reads_extras=True)
    if stores_transposed(base) and not all(reader.transposed(name) for name in reader.names()):
        raise ValueError(f"{source.path}: {_TRANSPOSED}, which only folders of PEFT say: give RUN/adapter")
    names = [name for name in reader.names() if _is_wanted(name, modules)]
    for name in tracked(names, source.run, "matrices"):
        with located(f"{source.path}: {name}"):
            layer, W0 = reader.layer(name), reader.base(name)
            if W0.dim() < 2:
                continue
            dM, dD = weight_change(new_weight(fitted(layer, W0), W0), W0)
        yield WeightPoint(method_of(layer.spec), source.run, source.step, str(name), dM, dD, source.score)


def _of_model(source: TrainedSource, base: BaseWeights, modules: re.Pattern[str] | None) -> Iterator[WeightPoint]:
    tuned = BaseWeights.open(source.path)
    check_same_architecture(tuned, base)
    if stores_transposed(base):
        raise ValueError(f"{source.path}: {_TRANSPOSED}, and fine-tuned models are not analysed")
    for name in changed_modules(tuned, base)[0]:
        if _is_wanted(name, modules):
            dM, dD = weight_change(tuned[name], base[name])
            yield WeightPoint("full", source.run, source.step, str(name), dM, dD, source.score)


def stores_transposed(base: BaseWeights) -> bool:
    """Whether a model of transformers keeps its layers as Conv1D, with weights (I, O)."""
    file = base.source / "config.json"
    return file.is_file() and read_json(file).get("model_type") in _CONV1D_MODELS


def _is_wanted(name: Name, modules: re.Pattern[str] | None) -> bool:
    return modules is None or modules.fullmatch(str(name)) is not None

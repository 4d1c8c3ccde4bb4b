"""Contents of a training's page other than its images: curves, settings, training images, next commands."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import saved_values
from dora_mm.config.models import validated
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import describe
from dora_mm.config.schema import PipelineConfig
from dora_mm.sampling.manifest import MANIFEST, ManifestEntry, read_manifest
from dora_mm.sampling.next_steps import next_steps
from dora_mm.utils.folders import inside
from dora_mm.utils.json_text import parse_json, read_json
from dora_mm.utils.messages import first_line
from dora_mm.utils.metric_rows import rows_until
from dora_mm.utils.run_directory import CONFIG, SUMMARY, RunDirectory

MOST_POINTS = 400  # of a curve: more are averaged, one for some two pixels
MOST_TRAINING_IMAGES = 24
LEGIBLE = 100  # points that are seen one by one; a curve of more is also shown smoothed
SMOOTHED_OVER = 20  # a curve is smoothed over this part of it
LOSS = "loss"
ALWAYS_SHOWN = (  # settings, also where they are the defaults
    *("model.path", "adapter.method", "adapter.rank", "adapter.alpha", "optimizer.name", "optimizer.lr"),
    *("schedule.name", "train.steps", "train.epochs", "train.batch_size", "seed"),
)
SHOWN_ELSEWHERE = ("pipeline", "name", "output", "sample.prompts")

Point = tuple[float, float]  # step and value


def read_images(path: Path) -> list[ManifestEntry]:
    """The images of a run, by its manifest; none of a training that drew none.

    Raises:
        ValueError: It is no such run, its manifest is damaged, or the config of a training does not fit.
    """
    return [] if training_config(path) and not (path / MANIFEST).is_file() else read_manifest(path)


def training_config(path: Path) -> PipelineConfig | None:
    """The config of a training; None where the folder is of something else.

    Raises:
        ValueError: It does not fit the schema.
    """
    try:
        values = saved_values(path)
    except ValueError:
        return None
    schema = SCHEMAS[values["pipeline"]]
    if schema.command != "train":
        return None
    try:
        return validated(schema, values)
    except ValidationError as error:
        problems = "; ".join(map(str, describe(error, schema, {})))
        raise ValueError(f"{path / CONFIG} is not as the training wrote it ({problems})") from None


def about_training(path: Path, config: PipelineConfig, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Data of a training for the page, as JSON values, without its images.

    Args:
        path: The run directory.
        config: The config of the training.
        summary: Its summary, where that is written after the page; None: the one that is there, if it has ended.
    """
    run, rows = RunDirectory(path), rows_until(path / "metrics.jsonl")
    if summary is None:
        summary = read_json(path / SUMMARY) if (path / SUMMARY).is_file() else {}
    done = summary.get("steps") or max((row["step"] for row in rows), default=0)
    folders = {folder.name.removeprefix("step-"): folder for folder in run.checkpoints.glob("step-*")}
    checkpoints = sorted((int(step), folder) for step, folder in folders.items() if step.isdecimal())
    steps = config.train.steps  # type: ignore[attr-defined]
    kept = {step: str(folder) for step, folder in checkpoints}
    if summary and run.adapter.is_dir():
        kept[done] = str(path)
    return {
        "run": str(path),
        "done": done,
        "steps": steps,
        "finished": bool(summary),
        "charts": charts(rows, rows_until(path / "validation" / "metrics.jsonl")),
        "checkpoints": [step for step, _ in checkpoints],
        "best": summary.get("best_step"),
        "kept": kept,
        "settings": chosen_settings(config),
        "summary": {name: value for name, value in summary.items() if value is not None},
        "config": (path / CONFIG).read_text(encoding="utf-8"),
        "next": next_steps(config, run, done, finished=bool(summary)),
        "answers": answers_by_step(run),
    }


# --- curves -----------------------------------------------------------------------------------------------------------


def charts(training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a training: one chart of losses, and one of scores where there are some.

    Args:
        training: The rows of metrics.jsonl.
        validation: Those of its validations: losses end in "loss", and the scores of tasks have no other name in front.

    Returns:
        The charts that have a curve, each with the points of its curves; `kind` is raw, smooth or validation.
    """
    points = _points(training, LOSS)
    names = dict.fromkeys(name for row in validation for name in row if name != "step")
    losses = [name for name in names if name.endswith(LOSS)]
    scores = [name for name in names if "/" not in name and not name.endswith((LOSS, "_minus_base"))]
    if len(scores) == 2:  # of one task, which is all there is overall
        scores = [name for name in scores if name != "overall"]
    many = len(points) > LEGIBLE
    curves = {
        LOSS: [
            _curve("loss of the steps", "raw" if many else "smooth", _thinned(points)),
            *([_curve("smoothed", "smooth", _thinned(_smoothed(points)))] if many else []),
            *(_curve(name, "validation", _points(validation, name)) for name in losses),
        ],
        "score": [_curve(name, "validation", _points(validation, name)) for name in scores],
    }
    charted = {name: [curve for curve in found if curve["points"]] for name, found in curves.items()}
    return [{"name": name, "curves": found} for name, found in charted.items() if found]


def _curve(name: str, kind: str, points: list[Point]) -> dict[str, Any]:
    return {"name": name.replace("held_out", "held-out").replace("_", " "), "kind": kind, "points": points}


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def _thinned(points: list[Point]) -> list[Point]:
    """At most `MOST_POINTS` points, each the mean of its neighbours, at the last one's step."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _smoothed(points: list[Point]) -> list[Point]:
    """The running mean over a part of the curve around each point; towards the ends, of what there is of it."""
    reach = len(points) // SMOOTHED_OVER // 2 + 1
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for index, (step, _) in enumerate(points):
        start, stop = max(0, index - reach), min(len(points), index + reach + 1)
        found.append((step, (sums[stop] - sums[start]) / (stop - start)))
    return found


# --- settings ---------------------------------------------------------------------------------------------------------


def chosen_settings(config: PipelineConfig) -> dict[str, str]:
    """The settings that a person looks for and those that are not the defaults, as text by dotted key."""
    everything, chosen = config.model_dump(mode="json"), config.model_dump(mode="json", exclude_defaults=True)
    shown = {key: value for key, value in _flat(everything) if key in ALWAYS_SHOWN and value is not None}
    shown |= {key: value for key, value in _flat(chosen) if key not in SHOWN_ELSEWHERE}
    return {key: _text(value) for key, value in shown.items()}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and all(item == {} for item in value.values()):  # names alone
            yield f"{before}{key}", ", ".join(value)
        elif isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


# --- images and answers ---------------------------------------------------------------------------------------------


def training_images(
    config: PipelineConfig, *, anywhere: bool = True
) -> tuple[dict[Path, tuple[Path, ...]], str | None]:
    """Some of the images that a training learns from, evenly spaced, with their references; none of questions.

    Args:
        config: The config of the training, which may be somebody else's.
        anywhere: Whether its folders may be outside of the current one. A page may be passed on.

    Returns:
        The files, and a sentence where there are more or none can be shown.
    """
    if not isinstance(config, TrainDiffusionConfig):
        return {}, None
    for folder in () if anywhere else config.data.all_folders.values():
        for path in (folder.path, *folder.references):
            try:
                inside(Path.cwd(), path)
            except ValueError:
                return (
                    {},
                    f"{path} is outside of the current folder. The page that the training writes shows its images.",
                )
    from dora_mm.data.images.listing import image_files  # imports torch, which other galleries do without

    try:
        found = list(image_files(config.data).items())
    except ValueError as error:
        return {}, f"{first_line(error)}."
    step = max(len(found) / MOST_TRAINING_IMAGES, 1)
    shown = dict(found[int(number * step)] for number in range(min(len(found), MOST_TRAINING_IMAGES)))
    notes = [f"{len(shown)} of {len(found)}"] if len(shown) < len(found) else []
    notes += ["held-out ones are among them"] if config.data.valid and config.data.valid.share else []
    return shown, ", ".join(notes) or None


def answers_by_step(run: RunDirectory) -> list[dict[str, Any]]:
    """The answers to some rows of a vision-language training, by step, as requested by `touch RUN/sample-now`."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for file in sorted(run.samples.glob("step-*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = parse_json(line, f"{file}, line {number}")
            key = row["task"], row["id"]
            about = {"question": row["question"], "references": row["references"], "answers": {}}
            found.setdefault(key, about)["answers"][int(file.stem.removeprefix("step-"))] = row["answer"]
    return list(found.values())

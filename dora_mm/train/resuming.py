"""Config changes on resuming: only keys on which the finished steps do not depend may change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.loader import differing_keys
from dora_mm.config.models import validated
from dora_mm.config.schema import PipelineConfig
from dora_mm.registries.renamed import migrated
from dora_mm.utils.messages import first_line
from dora_mm.utils.run_directory import CONFIG, INPUTS, RunDirectory

REASONS = {  # why the other keys and sections may not change
    "pipeline": "the run belongs to one recipe",
    "name": "it names the folder of a new run, and this run stays where it is",
    "output": "it names the folder of a new run, and this run stays where it is",
    "seed": "order and noise of the finished steps came from the old one",
    "backend": "the finished steps were computed by the old one, and the other one rounds differently",
    "model.date": "the finished steps have read rows of the old day (null: the day on which the run began)",
    "model": "the checkpoints belong to the old model",
    "vision": "the checkpoints belong to the old vision tower",
    "adapter": "the checkpoints hold an adapter with the old settings",
    "tokens": "the checkpoints hold rows of the old tokens",
    "data": "the finished steps were computed on the old data",
    "loss": "the finished steps minimized the old loss",
    "slider": "the finished steps minimized the old loss",
    "preserve": "the finished steps minimized the old loss",
    "preference": "the finished steps minimized the old loss",
    "optimizer": "the finished steps were computed with the old value",
    "schedule": "the finished steps were computed with the old learning rates",
    "ema": "the average of the finished steps was made with the old value",
    "train.gradient_accumulation_steps": "all steps have as many batches; for another number of processes, --resume "
    "divides them anew by itself",
    "train": "the finished steps were computed with the old value",
    "evaluate": "the scores so far, and with them the best adapter, were computed with the old value",
}


def started_config(run: Path, schemas: Mapping[str, type[PipelineConfig]]) -> PipelineConfig:
    """The config that a run was started or last resumed with, by its inputs.json; config.yaml may be edited since then.

    Raises:
        ValueError: The file is missing or damaged.
    """
    values = migrated(RunDirectory(run).inputs[CONFIG])
    try:
        return validated(schemas[values["pipeline"]], values)
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{run / INPUTS} is damaged ({first_line(error)}): the run cannot go on without it.") from None


def changed_values(before: PipelineConfig, after: PipelineConfig) -> dict[str, tuple[Any, Any]]:
    """The old and the new value of each dotted key (or section) in which two configs differ."""
    return {key: (_value(before, key), _value(after, key)) for key in differing_keys(before, after)}


def check_changes(where: str, before: PipelineConfig, after: PipelineConfig) -> None:
    """Checks that a run can go on with another config: its finished steps would have been the same.

    Args:
        where: What asks for the other config, for the message.
        before: The config that the run was started with.
        after: The config that it is resumed with.

    Raises:
        ValueError: A key differs that may not; the message has a sentence for each.
    """
    changeable = before.changeable
    if changeable is None:
        return
    changed = changed_values(before, after).items()
    refused = {key: v for key, v in changed if not any(f"{key}.".startswith(f"{name}.") for name in changeable)}
    if not refused:
        return
    sentences = [
        f"{key} cannot change from {as_written(old)} to {as_written(new)}: "
        + (REASONS.get(key) or REASONS[key.partition(".")[0]])
        for key, (old, new) in refused.items()
    ]
    allowed = f"--resume may change {', '.join(changeable)}" if changeable else "--resume changes no key"
    advice = f"{allowed}; for anything else start a new run"
    if len(sentences) == 1:
        raise ValueError(f"{where}: {sentences[0]} ({advice})")
    raise ValueError("\n  ".join([f"{where}: {len(sentences)} keys cannot change ({advice})", *sentences]))


def nearest_run(path: Path) -> str:
    """The text ", did you mean ...?" with the run directory around a path or the last one in it; empty if none is."""
    inside = sorted(file.parent for file in path.glob("*/config.yaml")) if path.is_dir() else []
    enclosing = [folder for folder in path.parents if (folder / "config.yaml").is_file()]
    found = [*enclosing[:1], *inside[-1:]]
    return f", did you mean {str(found[0])!r}?" if found else ""


def _value(config: PipelineConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def as_written(value: object) -> str:
    """A value as a config has it."""
    return "null" if value is None else repr(value)

"""The day of a run, which chat templates may ask for: it stays the same however long the run takes."""

from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dora_mm.config.schema import PipelineConfig
from dora_mm.utils.day import Day, today
from dora_mm.utils.home import expanded
from dora_mm.utils.run_directory import CONFIG, DAY, RunDirectory

ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


class RunDay(NamedTuple):
    """A day in ISO format, and where it is from, as the end of a sentence."""

    date: str
    source: str


def day_of_run(folder: Path) -> RunDay:
    """The day on which a run began; of one that was started before days were recorded, that of its oldest file.

    Raises:
        ValueError: `inputs.json` is missing or damaged.
    """
    if recorded := RunDirectory(folder).inputs.get(DAY):
        return RunDay(recorded, f"the day on which {folder} began")
    oldest = min(file.stat().st_mtime for file in folder.iterdir() if file.is_file())
    source = f"that of the oldest file of {folder}, which was started before days were recorded"
    return RunDay(date.fromtimestamp(oldest).isoformat(), source)


def day_for(model: Any, folder: str | Path | None, trained: RunDay | None = None) -> RunDay:
    """The day of what a run renders: that of its config, of the run that goes on, of its adapter, or else today.

    Args:
        model: The `model` section.
        folder: The run directory that goes on or is new; None: a new one.
        trained: The day of the adapter; None: there is no adapter, or it has none.

    Raises:
        ValueError: `inputs.json` of the run is missing or damaged.
    """
    if given := getattr(model, "date", None):
        return RunDay(given, "as model.date says")
    run = expanded(folder) if folder else None
    if run is not None and (run / CONFIG).is_file():
        return day_of_run(run)
    return trained or RunDay(today(), "today (model.date gives another day)")


def dated(config: ConfigT, day: RunDay) -> ConfigT:
    """A copy of a config, to load its model with this day. Runs save the original: the day makes no other run."""
    model: Any = getattr(config, "model", None)
    if "date" not in type(model).model_fields:
        return config
    return config.model_copy(update={"model": model.model_copy(update={"date": day.date})})


def started_on(day: Day) -> dict[str, str]:
    """The day as `inputs.json` has it; nothing of a model that cannot ask."""
    return {DAY: day.date} if day.date else {}

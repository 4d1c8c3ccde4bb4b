"""Metric logging to accelerate's trackers, in addition to metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking

from dora_mm.utils.lock import check_lock
from dora_mm.utils.messages import first_line
from dora_mm.utils.run_directory import CONFIG

log = logging.getLogger(__name__)


def chosen_trackers(names: Sequence[str] | None) -> list[str]:
    """The trackers that `train.track` names; of null, TensorBoard where it is installed.

    Raises:
        ValueError: The package of one is not installed.
    """
    if names is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(
            "; ".join(f"train.track: {name} needs the package {name}: pip install {name}" for name in missing)
        )
    return list(names)


@contextmanager
def started(names: Sequence[str], run: Path, config: Mapping[str, Any], step: int) -> Iterator[list["ShownMetrics"]]:
    """A context with trackers, which end with it.

    Args:
        names: Those of `chosen_trackers`.
        run: The run directory. Weights & Biases and Trackio show it as a run of the project with the config's name.
        config: The values of the config.
        step: The number of finished steps.

    Raises:
        ValueError: One cannot be started, such as without a login.
    """
    trackers: list[ShownMetrics] = []
    try:
        for name in names:
            trackers.append(ShownMetrics(name, _tracker(name, run, config, step)))
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


class ShownMetrics:
    """A tracker whose failures, such as of a network, do not end a training; the first one is a warning, and the last.

    Args:
        name: Of the tracker.
        tracker: The tracker of accelerate.
    """

    def __init__(self, name: str, tracker: Any):
        self.name, self._tracker = name, tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Shows values after `step` finished steps."""
        self._try("log", dict(values), step=step)

    def finish(self) -> None:
        """Ends the tracker, after it has sent all it has."""
        self._try("finish")

    def _try(self, method: str, *arguments: Any, **settings: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **settings)
        except Exception as error:  # each tracker raises its own
            self._tracker = None
            log.warning("train.track: %s shows no more (%s); metrics.jsonl goes on.", self.name, first_line(error))


def _tracker(name: str, run: Path, config: Mapping[str, Any], step: int) -> Any:
    project, title = str(config["name"]), run.name
    same_run = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on there, too
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": str(run), "purge_step": step + 1 if step else None},
        "wandb": {"name": title, "id": same_run, "resume": "allow", "dir": str(run), "config": dict(config)},
        "trackio": {"name": title, "resume": "allow", "config": dict(config)},
    }
    check_lock(run / CONFIG)  # TensorBoard would make a folder anew that was removed
    try:
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        tracker = kind("tensorboard" if name == "tensorboard" else project, **settings[name])
        tracker.start()
    except Exception as error:
        raise ValueError(f"train.track: {name} cannot start: {first_line(error)}") from error
    return tracker

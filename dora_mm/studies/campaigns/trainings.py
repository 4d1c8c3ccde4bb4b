"""The trainings of a campaign as processes and run directories."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dora_mm.studies.campaigns.subprocesses import TrainingProcess, run_processes, start_process
from dora_mm.studies.variants import Variant
from dora_mm.train.run import DIVERGED
from dora_mm.utils.circumstances import Record, circumstances
from dora_mm.utils.lock import LOCK
from dora_mm.utils.run_directory import SUMMARY, VERSIONS, RunDirectory

log = logging.getLogger(__name__)
DELETED_WHEN_FINISHED = ("checkpoints", "best")  # only the final adapter is needed


@dataclass(frozen=True)
class Training:
    """One training of a campaign: a variant at one learning rate and seed."""

    variant: Variant
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its run directory, such as dora-r8-lr0.001-seed0."""
        return f"{self.variant.key}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Trainings:
    """The trainings of a campaign, as run directories in its folder.

    Attributes:
        folder: The campaign's folder.
        base: The path of the config that all trainings share.
        workers: How many trainings run at a time.
        overrides: Returns the `key=value` overrides of `base` for one training.
        day: `model.date` of all of them, in ISO format; None: their models have no such key.
    """

    folder: Path
    base: str
    workers: int
    overrides: Callable[[Training], list[str]]
    day: str | None = None

    def run(self, training: Training) -> Path:
        """The run directory of a training."""
        return self.folder / "runs" / training.name

    def adapter(self, training: Training) -> Path:
        """The adapter folder of a training."""
        return self.run(training) / "adapter"

    def summary(self, training: Training) -> dict[str, Any]:
        """The summary.json of a finished training; empty: it has diverged."""
        file = self.run(training) / SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def threads(self) -> int:
        """The number of threads of each training."""
        return max(1, torch.get_num_threads() // self.workers)

    @property
    def now(self) -> Record:
        """The circumstances of trainings that start now."""
        return {**circumstances(), "threads": self.threads}

    def circumstances(self, name: str) -> list[Record]:
        """The records of the steps of a training, in their order; empty before it has begun."""
        run = RunDirectory(self.folder / "runs" / name)
        return list(run.circumstances().values()) if (run.path / VERSIONS).is_file() else []

    def has_diverged(self, training: Training) -> bool:
        """Whether a training ended since its loss or weights were not finite: its rate is too high."""
        return (self.run(training) / DIVERGED).is_file()

    def is_finished(self, training: Training) -> bool:
        """Whether there is nothing left to train, and the last process that did so came to its end."""
        has_ended = (self.run(training) / SUMMARY).is_file() or self.has_diverged(training)
        return has_ended and not (self.run(training) / LOCK).exists()

    def train(self, trainings: Iterable[Training], finished: Callable[[Training], None]) -> None:
        """Runs the trainings that are not finished, and resumes those that were interrupted.

        Args:
            trainings: The trainings.
            finished: Called with each of them when it is finished or has diverged, at once with those that are already.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        by_name = {training.name: training for training in trainings}
        unfinished = [training for training in by_name.values() if not self.is_finished(training)]
        for training in by_name.values():
            if training not in unfinished:
                self._delete_unneeded(training.name)  # a kill may have come before
                finished(training)

        def succeeded(process: TrainingProcess) -> None:
            self._delete_unneeded(process.name)
            log.info("Trained %s.", process.name)
            finished(by_name[process.name])

        if unfinished:
            starts = [partial(self._start, training) for training in unfinished]
            run_processes(starts, self.workers, succeeded, lambda process: self.has_diverged(by_name[process.name]))

    def _start(self, training: Training) -> TrainingProcess:
        folder = self.run(training)
        if (folder / "config.yaml").is_file():
            arguments = ["train", "--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            settings = [*self.overrides(training), f"output={folder}"]
            settings += [f"model.date={self.day}"] if self.day else []
            arguments = ["train", self.base, *(item for text in settings for item in ("--set", text))]
        return start_process(training.name, arguments, self.folder / "logs" / f"{training.name}.txt", self.threads)

    def _delete_unneeded(self, training: str) -> None:
        for name in DELETED_WHEN_FINISHED:
            shutil.rmtree(self.folder / "runs" / training / name, ignore_errors=True)

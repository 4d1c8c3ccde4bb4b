"""What campaigns of many trainings have in common: the folder that is gone on with, its runs, and the choice of rates.

Every finished training is a run in the folder, so a campaign that was cut off goes on where it was.
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dora_mm.config.loader import differing_keys, load_config
from dora_mm.config.schema import LearningRates, PipelineConfig
from dora_mm.eval.comparison import Variant
from dora_mm.train.jobs import Job, run_jobs, start_job
from dora_mm.train.run import RunDirectory, open_run
from dora_mm.utils.atomic import write_text

log = logging.getLogger(__name__)
DONE = "summary.json"  # the last thing that a training writes
NOT_KEPT = ("checkpoints", "best")  # of a finished one: the adapter is what counts


@dataclass(frozen=True)
class Training:
    variant: Variant
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.key}-lr{self.rate:g}-seed{self.seed}"


class Chosen(NamedTuple):
    """A learning rate; at_end: it is the lowest or the highest that was tried, so a better one may lie beyond."""

    rate: float
    at_end: bool

    def __str__(self) -> str:
        return f"{self.rate:g}{'*' if self.at_end else ''}"


def open_campaign(config: PipelineConfig, output: str, inputs: Mapping[str, str], free: Collection[str]) -> Path:
    """The campaign's folder: a new one, or one that was started with the same config and the same files.

    Args:
        inputs: digests, by what they are of, of all that the config only names.
        free: the keys that change no number, and may differ.

    Raises:
        ValueError: the folder is no campaign's, or was started with something else.
    """
    folder = Path(output).expanduser()
    saved = folder / "config.yaml"
    if not folder.exists():
        return open_run(config, inputs).path
    if not saved.is_file():
        raise ValueError(f"output: {folder} exists and is no comparison: name another folder")
    differing = [key for key in differing_keys(load_config(saved), config) if key not in free]
    differing += RunDirectory(folder).changed(inputs)
    if differing:
        raise ValueError(f"output: {folder} was started with other values of {', '.join(differing)}: name another")
    return folder


@dataclass(frozen=True)
class Trainings:
    """The trainings of a campaign, as runs in its folder.

    base: the config that they have in common. overrides: `key=value` that one of them has in place of its values.
    """

    folder: Path
    base: str
    workers: int
    overrides: Callable[[Training], list[str]]

    def run(self, training: Training) -> Path:
        return self.folder / "runs" / training.name

    def adapter(self, training: Training) -> Path:
        return self.run(training) / "adapter"

    def summary(self, training: Training) -> dict[str, Any]:
        return json.loads((self.run(training) / DONE).read_text())

    def train(self, trainings: Iterable[Training]) -> None:
        """Trains those that are not done yet, and goes on with those that were cut off. Raises as `run_jobs` does."""
        left = [training for training in trainings if not (self.run(training) / DONE).is_file()]
        if left:
            run_jobs([partial(self._start, training) for training in left], self.workers, self._clear)

    def _start(self, training: Training) -> Job:
        folder = self.run(training)
        if (folder / "config.yaml").is_file():
            arguments = ["train", "--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            settings = [*self.overrides(training), f"output={folder}"]
            arguments = ["train", self.base, *(item for text in settings for item in ("--set", text))]
        threads = max(1, torch.get_num_threads() // self.workers)
        return start_job(training.name, arguments, self.folder / "logs" / f"{training.name}.txt", threads)

    def _clear(self, job: Job) -> None:
        for name in NOT_KEPT:
            shutil.rmtree(self.folder / "runs" / job.name / name, ignore_errors=True)
        log.info("Trained %s.", job.name)

    def choose_rates(
        self,
        candidates: Mapping[Variant, Sequence[float]],
        value: Callable[[Training], float],
        *,
        seed: int,
        extra_rates: int,
    ) -> dict[Variant, Chosen]:
        """The rate with the highest `value` of those that each variant is trained at; all values are in rates/.

        While the best one lies at an end, up to `extra_rates` further ones are tried there, the same factor apart.
        """
        found: dict[Variant, dict[float, float]] = {variant: {} for variant in candidates}
        pending = {variant: sorted(rates) for variant, rates in candidates.items()}
        for extra_left in range(extra_rates, -1, -1):
            trainings = [Training(variant, rate, seed) for variant, rates in pending.items() for rate in rates]
            self.train(trainings)
            for training in trainings:
                found[training.variant][training.rate] = value(training)
            pending = {
                variant: [beyond(tried)] for variant, tried in found.items() if extra_left and best_at_end(tried)
            }
        for variant, tried in found.items():
            values = {f"{rate:g}": tried[rate] for rate in sorted(tried)}
            write_text(self.folder / "rates" / f"{variant.key}.json", json.dumps(values) + "\n")
        return {variant: Chosen(best_of(tried), best_at_end(tried)) for variant, tried in found.items()}


def rates_of(rates: LearningRates, wanted: Iterable[Variant]) -> dict[Variant, tuple[float, ...]]:
    """The candidates of every variant: those of its method."""
    candidates = {"full": rates.full, "lora": rates.lora, "dora": rates.dora}
    return {variant: candidates[variant.method] for variant in wanted}


def best_of(tried: Mapping[float, float]) -> float:
    return max(sorted(tried), key=tried.__getitem__)


def best_at_end(tried: Mapping[float, float]) -> bool:
    return best_of(tried) in (min(tried), max(tried))


def beyond(tried: Mapping[float, float]) -> float:
    """The next rate past the end where the best one lies."""
    rates = sorted(tried, reverse=best_of(tried) == min(tried))
    return rates[-1] ** 2 / rates[-2]

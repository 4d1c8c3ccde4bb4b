"""The trainings of a campaign as processes and run directories, and the choice of learning rates."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dora_mm.config.training import LearningRates
from dora_mm.eval.comparison import Variant
from dora_mm.train.campaigns.subprocesses import TrainingProcess, run_processes, start_process
from dora_mm.train.run import SUMMARY
from dora_mm.utils.atomic import write_text

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


class RateChoice(NamedTuple):
    """The learning rate that was chosen for a variant. As text, an extreme one is marked with an asterisk.

    Attributes:
        rate: The learning rate.
        is_extreme: Whether it is the lowest or the highest that was tried, so that a better one may lie outside.
    """

    rate: float
    is_extreme: bool

    def __str__(self) -> str:
        return f"{self.rate:g}{'*' if self.is_extreme else ''}"


@dataclass(frozen=True)
class Trainings:
    """The trainings of a campaign, as run directories in its folder.

    Attributes:
        folder: The campaign's folder.
        base: The path of the config that all trainings share.
        workers: How many trainings run at a time.
        overrides: Returns the `key=value` overrides of `base` for one training.
    """

    folder: Path
    base: str
    workers: int
    overrides: Callable[[Training], list[str]]

    def run(self, training: Training) -> Path:
        """The run directory of a training."""
        return self.folder / "runs" / training.name

    def adapter(self, training: Training) -> Path:
        """The adapter folder of a training."""
        return self.run(training) / "adapter"

    def summary(self, training: Training) -> dict[str, Any]:
        """The summary.json of a finished training."""
        return json.loads((self.run(training) / SUMMARY).read_text())

    def train(self, trainings: Iterable[Training]) -> None:
        """Runs the trainings that are not finished, and resumes those that were interrupted.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        unfinished = [training for training in trainings if not (self.run(training) / SUMMARY).is_file()]
        if unfinished:
            run_processes(
                [partial(self._start, training) for training in unfinished], self.workers, self._delete_unneeded
            )

    def _start(self, training: Training) -> TrainingProcess:
        folder = self.run(training)
        if (folder / "config.yaml").is_file():
            arguments = ["train", "--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            settings = [*self.overrides(training), f"output={folder}"]
            arguments = ["train", self.base, *(item for text in settings for item in ("--set", text))]
        threads = max(1, torch.get_num_threads() // self.workers)
        return start_process(training.name, arguments, self.folder / "logs" / f"{training.name}.txt", threads)

    def _delete_unneeded(self, training: TrainingProcess) -> None:
        for name in DELETED_WHEN_FINISHED:
            shutil.rmtree(self.folder / "runs" / training.name / name, ignore_errors=True)
        log.info("Trained %s.", training.name)

    def choose_rates(
        self,
        candidates: Mapping[Variant, Sequence[float]],
        value: Callable[[Training], float],
        *,
        seed: int,
        extra_rates: int,
    ) -> dict[Variant, RateChoice]:
        """Trains each variant at its candidate learning rates and returns the best rate of each.

        The values of all rates are saved in the folder's rates/.

        Args:
            candidates: The learning rates to try, by variant.
            value: Scores a finished training; higher is better.
            seed: The seed of these trainings.
            extra_rates: How many further rates to try, the same factor apart, while the best one is the lowest or the
                highest so far.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        found: dict[Variant, dict[float, float]] = {variant: {} for variant in candidates}
        pending = {variant: sorted(rates) for variant, rates in candidates.items()}
        for remaining_extra in range(extra_rates, -1, -1):
            trainings = [Training(variant, rate, seed) for variant, rates in pending.items() for rate in rates]
            self.train(trainings)
            for training in trainings:
                found[training.variant][training.rate] = value(training)
            pending = {
                variant: [next_rate(tried)]
                for variant, tried in found.items()
                if remaining_extra and best_is_extreme(tried)
            }
        for variant, tried in found.items():
            values = {f"{rate:g}": tried[rate] for rate in sorted(tried)}
            write_text(self.folder / "rates" / f"{variant.key}.json", json.dumps(values) + "\n")
        return {variant: RateChoice(best_rate(tried), best_is_extreme(tried)) for variant, tried in found.items()}

    def train_chosen(self, chosen: Mapping[Variant, RateChoice], seeds: Sequence[int]) -> dict[Variant, list[Training]]:
        """Trains each variant at its chosen learning rate, once per seed, and returns the trainings.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        trainings = {
            variant: [Training(variant, rate.rate, seed) for seed in seeds] for variant, rate in chosen.items()
        }
        self.train(training for found in trainings.values() for training in found)
        return trainings


def candidate_rates(rates: LearningRates, wanted: Iterable[Variant]) -> dict[Variant, tuple[float, ...]]:
    """The candidate learning rates of each wanted variant, which are those of its method."""
    candidates = {"full": rates.full or (), "lora": rates.lora, "dora": rates.dora}
    return {variant: candidates[variant.method] for variant in wanted}


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate with the highest value; the lower one if two are equal. `tried` maps rates to values."""
    return max(sorted(tried), key=tried.__getitem__)


def best_is_extreme(tried: Mapping[float, float]) -> bool:
    """Whether the best learning rate is the lowest or the highest that was tried."""
    return best_rate(tried) in (min(tried), max(tried))


def next_rate(tried: Mapping[float, float]) -> float:
    """The next learning rate to try outside the range tried so far, on the side of the best one."""
    rates = sorted(tried, reverse=best_rate(tried) == min(tried))
    return rates[-1] ** 2 / rates[-2]

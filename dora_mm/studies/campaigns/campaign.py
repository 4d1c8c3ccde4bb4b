"""A campaign: many trainings of one config, each scored, in one table.

Every finished training is a row of a CSV file, which reports are made of. So an interrupted campaign resumes where it
stopped, and goes on from that file without its folder. The trainings are run directories in the campaign's folder.
Which trainings there are is for `comparison.py` and `tuning.py` to say.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Generic

import numpy as np
import torch

from dora_mm.config.loader import load_config
from dora_mm.studies.campaigns.evaluation import ScoresT, Scoring
from dora_mm.studies.campaigns.kept import about_results
from dora_mm.studies.campaigns.training_rows import FAILED, TrainingRow, TrainingRows, row_of, rows_file
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CampaignConfig
from dora_mm.studies.curves import RateCurve
from dora_mm.studies.variants import Variant
from dora_mm.train.day import started_on
from dora_mm.train.run import open_run, reopen_run
from dora_mm.utils.run_directory import DAY

log = logging.getLogger(__name__)


class Campaign(Generic[ScoresT]):
    """A campaign and its folder, which is new or goes on.

    Args:
        config: The config.
        scoring: What is trained, and how it is scored.
        seeds: Of the trainings.
        rate_seeds: Learning rates are chosen by so many of the first seeds.

    Raises:
        ValueError: The folder belongs to another campaign, or the file of rows cannot be read.
    """

    def __init__(self, config: CampaignConfig, scoring: Scoring[ScoresT], seeds: Sequence[int], rate_seeds: int = 1):
        self.config, self.scoring, self.inputs = config, scoring, scoring.inputs
        self.seeds, self.rate_seeds = seeds, seeds[:rate_seeds]
        run = reopen_run(config, self.inputs, config.free_keys)
        run = run or open_run(config, {**self.inputs, **started_on(scoring.day)})
        self.folder, day = run.path, scoring.day.date
        self.trainings = Trainings(self.folder, config.base, config.workers, scoring.overrides, day)
        self.rows = TrainingRows(rows_file(config, self.folder), cache(self.digest))
        if message := about_results(self.trainings, self.rows):
            log.warning(message)

    def digest(self, training: Training) -> str:
        """The digest of all that a row depends on: the training's config, its inputs, and how it is scored.

        Keys that have their defaults do not count, so that a new key changes no digest.
        """
        trained = load_config(self.config.base, self.scoring.overrides(training))
        about = {
            "training": trained.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
            "scored": self.config.scored,
            "inputs": {name: digest for name, digest in self.inputs.items() if name != "base"},
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def finish(self, trainings: Sequence[Training], *, reported: bool) -> None:
        """Trains what has no row yet, and scores it.

        Args:
            trainings: The trainings.
            reported: Whether their reported scores are wanted, too.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        missing = [
            training
            for training in trainings
            if not self.is_there(training, reported=reported)
            or (self.is_for_rates(training) and not self.has_value(training))
        ]
        self.trainings.train(missing, partial(self.score, reported=reported))

    def is_there(self, training: Training, *, reported: bool) -> bool:
        """Whether a training has a row, and reported scores where they are wanted."""
        row = self.rows.get(training)
        return row is not None and (bool(row.scores) or row.has_diverged or not reported)

    def has_value(self, training: Training) -> bool:
        """Whether a training has a score by which rates are chosen."""
        row = self.rows.get(training)
        return row is not None and bool(row.value)

    def has_scores(self, training: Training) -> bool:
        """Whether a training is there with reported scores; one that has diverged has none."""
        return self.is_there(training, reported=True) and not self.row(training).has_diverged

    def is_for_rates(self, training: Training) -> bool:
        """Whether learning rates are chosen by a training."""
        return training.seed in self.rate_seeds

    def score(self, training: Training, *, reported: bool) -> None:
        """Scores a finished training, and writes its row."""
        if self.trainings.has_diverged(training):
            value, scores = FAILED, ""
            log.warning("%s has diverged, and counts as 0.", training.name)
        else:
            value = self.scoring.value(self.trainings, training) if self.is_for_rates(training) else None
            scores = self.scoring.scored(self.trainings, training) if reported else ""
        torch.cuda.empty_cache()  # the next training is another process, which needs what scoring took
        about = {"summary": self.trainings.summary(training), "digest": self.rows.digest(training)}
        day = about["summary"].get(DAY)
        days = [{DAY: day}] if day else []
        about["circumstances"] = [*self.trainings.circumstances(training.name), self.trainings.now, *days]
        self.rows.add([row_of(training, value=value, scores=scores, **about)])

    def row(self, training: Training) -> TrainingRow:
        """The row of a training that is there."""
        row = self.rows.get(training)
        assert row is not None, training.name
        return row

    def choosing(self, variant: Variant, rates: Iterable[float]) -> list[int]:
        """The seeds by which one of these rates is chosen: those that have a value at each."""
        return [
            seed for seed in self.rate_seeds if all(self.has_value(Training(variant, rate, seed)) for rate in rates)
        ]

    def values(self, variant: Variant, rates: Collection[float]) -> dict[float, float]:
        """The mean value of each rate over the same seeds: all that choose or, of rows alone, those that are there."""
        seeds = self.choosing(variant, rates)
        return {rate: fmean(self.row(Training(variant, rate, seed)).number for seed in seeds) for rate in rates}

    def machines(self, trainings: Sequence[Training]) -> str:
        """A sentence on what trainings that are there were made on, since rounding differs between processors."""
        hosts = Counter(
            f"{row.processor}, threads {row.threads}" if row.processor else "not recorded"
            for row in map(self.row, trainings)
        )
        found = f"Trained on: {'; '.join(f'{host}: {count}' for host, count in hosts.most_common())}."
        days = Counter(row.day for row in map(self.row, trainings))
        if set(days) == {""}:
            return found
        named = "; ".join(f"{day or 'none'}: {count}" for day, count in sorted(days.items()))
        return f"{found} The chat template got the day {named}."

    def scores(self, repeated: Sequence[Training]) -> ScoresT:
        """The reported scores of trainings that differ in nothing but the seed."""
        return self.scoring.scores([self.row(training).scores for training in repeated])

    def curve(self, variant: Variant, rates: Sequence[float]) -> RateCurve:
        """The scores of a variant over its learning rates, with the seeds of which there are rows."""
        found: dict[float, dict[int, np.ndarray | None]] = {}
        for rate in rates:
            trainings = [Training(variant, rate, seed) for seed in self.seeds]
            there = [each for each in trainings if self.is_there(each, reported=True)]
            found[rate] = {
                each.seed: self.scoring.cells(self.scores([each]))[:, 0] if self.has_scores(each) else None
                for each in there
            }
        return RateCurve.of(found)

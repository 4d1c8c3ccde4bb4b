"""A campaign: methods of training, each at its best learning rate and with several seeds, in one table.

Every finished training is a row of a CSV file, which the report is made of. So an interrupted campaign resumes where it
stopped, and goes on from that file without its folder. The trainings are run directories in the campaign's folder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from statistics import median
from typing import Any, Generic

import numpy as np

from dora_mm.config.loader import load_config
from dora_mm.sampling.sheets import save_atomically
from dora_mm.studies.campaigns.evaluation import Evaluation, ScoresT, compared
from dora_mm.studies.campaigns.rates import RateChoice, best_rate, beyond, candidate_rates, choice_of, with_neighbours
from dora_mm.studies.campaigns.rows import FAILED, TrainingRow, TrainingRows, row_of, rows_file
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CompareConfig
from dora_mm.studies.curves import CurvePoint, RateCurve, curves_csv, curves_paragraphs
from dora_mm.studies.plots import plot_curves
from dora_mm.studies.tables import Result
from dora_mm.studies.variants import Variant, table_rows
from dora_mm.train.run import open_run, reopen_run
from dora_mm.utils.atomic import write_text

log = logging.getLogger(__name__)
FREE_KEYS = ("workers", "name", "rows", "pictures.columns")  # config keys that change no result
COSTS = ("seconds_per_step", "peak_memory_mb")  # entries of summaries whose median over the seeds is reported


class Campaign(Generic[ScoresT]):
    """A campaign and its folder, which is new or goes on.

    Args:
        config: The config.
        evaluation: What is trained, and how it is scored.

    Raises:
        ValueError: The folder belongs to another campaign, or the file of rows cannot be read.
    """

    def __init__(self, config: CompareConfig, evaluation: Evaluation[ScoresT]):
        self.config, self.evaluation, self.inputs = config, evaluation, evaluation.inputs
        run = reopen_run(config, self.inputs, FREE_KEYS) or open_run(config, self.inputs)
        self.folder = run.path
        self.trainings = Trainings(self.folder, config.base, config.workers, evaluation.overrides)
        self.rows = TrainingRows(rows_file(config, self.folder), cache(self.digest))

    def digest(self, training: Training) -> str:
        """The digest of all that a row depends on: the training's config, its inputs, and how it is scored.

        Keys that have their defaults do not count, so that a new key changes no digest.
        """
        trained = load_config(self.config.base, self.evaluation.overrides(training))
        scored = self.config.pictures or self.config.questions
        assert scored is not None
        about = {
            "training": trained.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
            "scored": scored.model_dump(mode="json", exclude_defaults=True, exclude={"columns"}),
            "inputs": {name: digest for name, digest in self.inputs.items() if name != "base"},
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    # --- trainings ---------------------------------------------------------------------------------------------------

    def finish(self, trainings: Sequence[Training], *, reported: bool) -> None:
        """Trains what has no row yet, and scores it.

        Args:
            trainings: The trainings.
            reported: Whether their reported scores are wanted, too.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        missing = [training for training in trainings if not self.is_there(training, reported=reported)]
        self.trainings.train(missing, partial(self.score, reported=reported))

    def is_there(self, training: Training, *, reported: bool) -> bool:
        """Whether a training has a row with all that is wanted of it."""
        row = self.rows.get(training)
        if row is None or (reported and not row.scores and not row.has_diverged):
            return False
        return bool(row.value) or not self.is_for_rates(training)

    def has_scores(self, training: Training) -> bool:
        """Whether a training is there with reported scores; one that has diverged has none."""
        return self.is_there(training, reported=True) and not self.row(training).has_diverged

    def is_for_rates(self, training: Training) -> bool:
        """Whether learning rates are chosen by a training."""
        return training.seed == self.config.seeds[0]

    def score(self, training: Training, *, reported: bool) -> None:
        """Scores a finished training, and writes its row."""
        if self.trainings.has_diverged(training):
            value, scores = FAILED, ""
            log.warning("%s has diverged, and counts as 0.", training.name)
        else:
            value = self.evaluation.value(self.trainings, training) if self.is_for_rates(training) else None
            scores = self.evaluation.scored(self.trainings, training) if reported else ""
        summary, digest = self.trainings.summary(training), self.rows.digest(training)
        self.rows.add([row_of(training, value=value, scores=scores, summary=summary, digest=digest)])

    def search(self) -> dict[Variant, dict[float, float]]:
        """Trains each variant at its candidate learning rates, and at further ones while the best may lie outside.

        Returns:
            The value of each rate that was tried, by variant.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        seed, reported = self.config.seeds[0], self.config.curves
        candidates = candidate_rates(self.config.learning_rates, compared(self.config))
        found: dict[Variant, dict[float, float]] = {variant: {} for variant in candidates}
        pending = {variant: sorted(rates) for variant, rates in candidates.items()}
        for remaining in range(self.config.extra_rates, -1, -1):
            trainings = [Training(variant, rate, seed) for variant, rates in pending.items() for rate in rates]
            self.finish(trainings, reported=reported)
            for training in trainings:
                found[training.variant][training.rate] = self.row(training).number
            pending = {
                variant: [beyond(tried, end) for end in self.open_ends(variant, tried)] if remaining else []
                for variant, tried in found.items()
            }
        return found

    def open_ends(self, variant: Variant, tried: Mapping[float, float]) -> list[float]:
        """The lowest and the highest rate, as far as better ones may lie outside, with curves also those as good."""
        drawn = self.config.curves and any(tried.values())
        open_ends = self.curve(variant, list(tried)).open_ends() if drawn else []
        return [end for end in (min(tried), max(tried)) if end == best_rate(tried) or end in open_ends]

    def train_chosen(self, tried: Mapping[Variant, Mapping[float, float]]) -> None:
        """Trains each variant at its best learning rate with all seeds; with curves at the neighbours of that, too.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        for seed in self.config.seeds:  # a seed of all before the next, so that an interrupted campaign compares equals
            trainings = [
                Training(variant, rate, seed)
                for variant, rates in tried.items()
                for rate in (
                    with_neighbours(list(rates), best_rate(rates)) if self.config.curves else [best_rate(rates)]
                )
            ]
            self.finish(trainings, reported=True)

    # --- the report --------------------------------------------------------------------------------------------------

    def row(self, training: Training) -> TrainingRow:
        """The row of a training that is there."""
        row = self.rows.get(training)
        assert row is not None, training.name
        return row

    def tried(self) -> dict[Variant, dict[float, float]]:
        """The rates of which there are rows, with their values, by variant; nothing is trained."""
        found = {}
        for variant in compared(self.config):
            trainings = [Training(variant, rate, self.config.seeds[0]) for rate in self.rows.rates(variant)]
            there = [each for each in trainings if self.is_there(each, reported=self.config.curves)]
            found[variant] = {each.rate: self.row(each).number for each in there}
        return found

    def report(self, tried: Mapping[Variant, Mapping[float, float]]) -> None:
        """Writes table.md, results.csv, sheet.png and the curves, of what there are rows of, and prints the table.

        Args:
            tried: The values of the rates by variant, as `search` returns them.

        Raises:
            ValueError: There is no row to report.
        """
        evaluation, first = self.evaluation, self.config.seeds[0]
        chosen = {variant: choice_of(rates) for variant, rates in tried.items() if rates}
        chosen = {v: rate for v, rate in chosen.items() if self.has_scores(Training(v, rate.rate, first))}
        if not chosen:
            raise ValueError(f"rows: {self.rows.file} has no training to report yet")
        seeds = [
            seed
            for seed in self.config.seeds
            if all(self.has_scores(Training(variant, rate.rate, seed)) for variant, rate in chosen.items())
        ]
        trained = {v: [Training(v, rate.rate, seed) for seed in seeds] for v, rate in chosen.items()}
        scores = {variant: self.scores(repeated) for variant, repeated in trained.items()}
        results, rows = [*evaluation.baselines(self.folder)], table_rows(self.config.ranks, trained)
        for name, variant in rows:
            summary = self.summary(trained[variant])
            results.append(Result(name, evaluation.intervals(scores[variant]), str(chosen[variant]), summary))
        report = evaluation.report(self.folder, results, scores, {name: trained[variant] for name, variant in rows})
        curves = self.curves({variant: list(tried[variant]) for variant in chosen}, chosen)
        text = "\n\n".join([*report.paragraphs, *self.about_diverged(chosen), *curves])
        write_text(self.folder / "table.md", text + "\n")
        write_text(self.folder / "results.csv", report.csv)
        print(f"{text}\n\ntable    {self.folder / 'table.md'}")
        if report.sheet:
            save_atomically(self.folder / "sheet.png", report.sheet)
            print(f"sheet    {self.folder / 'sheet.png'}")

    def about_diverged(self, chosen: Mapping[Variant, RateChoice]) -> list[str]:
        """A sentence on the trainings at chosen rates that have diverged, whose seeds the tables leave out."""
        trainings = [Training(v, rate.rate, seed) for v, rate in chosen.items() for seed in self.config.seeds]
        there = [training for training in trainings if self.is_there(training, reported=True)]
        if names := [training.name for training in there if self.row(training).has_diverged]:
            return [
                f"Diverged: {', '.join(names)}. The tables leave these seeds out, of all methods; in curves they are 0."
            ]
        return []

    def scores(self, repeated: Sequence[Training]) -> ScoresT:
        """The reported scores of trainings that differ in nothing but the seed."""
        return self.evaluation.scores([self.row(training).scores for training in repeated])

    def summary(self, repeated: Sequence[Training]) -> dict[str, Any]:
        """The summary of trainings that differ in nothing but the seed: the first one's, with the median of COSTS."""
        found = [self.row(training).summary for training in repeated]
        return found[0] | {key: median(each[key] for each in found) for key in COSTS if key in found[0]}

    def curve(self, variant: Variant, rates: Sequence[float]) -> RateCurve:
        """The scores of a variant over its learning rates, with the seeds of which there are rows."""
        found: dict[float, dict[int, np.ndarray | None]] = {}
        for rate in sorted(rates):
            trainings = [Training(variant, rate, seed) for seed in self.config.seeds]
            there = [each for each in trainings if self.is_there(each, reported=True)]
            found[rate] = {
                each.seed: self.evaluation.cells(self.scores([each]))[:, 0] if self.has_scores(each) else None
                for each in there
            }
        diverged = np.zeros_like(next(c for own in found.values() for c in own.values() if c is not None))
        return RateCurve(
            {
                rate: CurvePoint(np.stack([diverged if c is None else c for c in own.values()], axis=1), tuple(own))
                for rate, own in found.items()
            }
        )

    def curves(self, rates: Mapping[Variant, Sequence[float]], chosen: Mapping[Variant, RateChoice]) -> list[str]:
        """Writes curves.csv and the figures, and returns the paragraphs about them; nothing without `curves`."""
        if not self.config.curves:
            return []
        found = {variant: self.curve(variant, own) for variant, own in rates.items()}
        best = {variant: rate.rate for variant, rate in chosen.items()}
        write_text(self.folder / "curves.csv", curves_csv(found))
        try:
            for file in plot_curves(found, best, self.evaluation.score_title, self.folder):
                print(f"figure   {file}")
        except ModuleNotFoundError as error:
            log.warning("The figures are left out: they need %s (pip install 'dora_mm[eval]').", error.name)
        return curves_paragraphs(found, best, self.config.ranks, self.evaluation.score_title)

"""A comparison: methods of training, each at its best learning rate and with several seeds, in one table."""

import logging
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Generic

from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.studies.campaigns.campaign import Campaign
from dora_mm.studies.campaigns.evaluation import Evaluation, ScoresT, compared
from dora_mm.studies.campaigns.rates import RateChoice, best_rate, beyond, candidate_rates, choice_of, with_neighbours
from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.config import CompareConfig
from dora_mm.studies.curves import curves_csv, curves_paragraphs
from dora_mm.studies.plots import plot_curves
from dora_mm.studies.tables import Result
from dora_mm.studies.variants import Variant, table_rows
from dora_mm.utils.atomic import write_text

log = logging.getLogger(__name__)
COSTS = ("seconds_per_step", "peak_memory_mb")  # entries of summaries whose median over the seeds is reported


class MethodComparison(Generic[ScoresT]):
    """The trainings of a comparison, as a campaign, and its report.

    Args:
        config: The config.
        evaluation: What is trained, and how it is scored.

    Raises:
        ValueError: As in `Campaign`.
    """

    def __init__(self, config: CompareConfig, evaluation: Evaluation[ScoresT]):
        self.config, self.evaluation = config, evaluation
        self.campaign = Campaign(config, evaluation, config.seeds, config.rate_seeds)
        self.folder = self.campaign.folder

    def search(self) -> dict[Variant, dict[float, float]]:
        """Trains each variant at its candidate learning rates, and at further ones while the best may lie outside.

        Returns:
            The value of each rate that was tried, by variant.

        Raises:
            ValueError: A training reported a user's mistake.
            RuntimeError: A training failed in any other way.
        """
        seeds, reported = self.campaign.rate_seeds, self.config.curves
        candidates = candidate_rates(self.config.learning_rates, compared(self.config))
        found: dict[Variant, dict[float, float]] = {variant: {} for variant in candidates}
        pending = {variant: sorted(rates) for variant, rates in candidates.items()}
        for remaining in range(self.config.extra_rates, -1, -1):
            rates = [(variant, rate) for variant, own in pending.items() for rate in own]
            self.campaign.finish([Training(*each, seed) for seed in seeds for each in rates], reported=reported)
            found = {v: self.campaign.values(v, [*own, *pending[v]]) for v, own in found.items()}
            pending = {
                variant: [beyond(tried, end) for end in self.open_ends(variant, tried)] if remaining else []
                for variant, tried in found.items()
            }
        return found

    def open_ends(self, variant: Variant, tried: Mapping[float, float]) -> list[float]:
        """The lowest and the highest rate, as far as better ones may lie outside, with curves also those as good."""
        has_curves = self.config.curves and any(tried.values())
        open_ends = self.campaign.curve(variant, list(tried)).open_ends() if has_curves else []
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
            self.campaign.finish(trainings, reported=True)

    # --- the report --------------------------------------------------------------------------------------------------

    def tried(self) -> dict[Variant, dict[float, float]]:
        """The rates of which there are rows, with their values, by variant; nothing is trained."""
        return {variant: self.campaign.values(variant, self.tried_rates(variant)) for variant in compared(self.config)}

    def tried_rates(self, variant: Variant) -> list[float]:
        """The rates of a variant that the first seed has tried, ascending."""
        firsts = [Training(variant, rate, self.config.seeds[0]) for rate in self.campaign.rows.rates(variant)]
        there = [each for each in firsts if self.campaign.is_there(each, reported=self.config.curves)]
        return [each.rate for each in there if self.campaign.has_value(each)]

    def report(self, tried: Mapping[Variant, Mapping[float, float]]) -> None:
        """Writes table.md, results.csv, sheet.png and the curves, of what there are rows of, and prints the table.

        Args:
            tried: The values of the rates by variant, as `search` returns them.

        Raises:
            ValueError: There is no row to report.
        """
        evaluation, first = self.evaluation, self.config.seeds[0]
        chosen = {variant: choice_of(rates) for variant, rates in tried.items() if rates}
        chosen = {v: rate for v, rate in chosen.items() if self.campaign.has_scores(Training(v, rate.rate, first))}
        if not chosen:
            raise ValueError(f"rows: {self.campaign.rows.file} has no training to report yet")
        seeds = [
            seed
            for seed in self.config.seeds
            if all(self.campaign.has_scores(Training(variant, rate.rate, seed)) for variant, rate in chosen.items())
        ]
        trained = {v: [Training(v, rate.rate, seed) for seed in seeds] for v, rate in chosen.items()}
        scores = {variant: self.campaign.scores(repeated) for variant, repeated in trained.items()}
        results, rows = [*evaluation.baselines(self.folder)], table_rows(self.config.ranks, trained)
        for name, variant in rows:
            summary = self.summary(trained[variant])
            results.append(
                Result(name, evaluation.confidence_intervals(scores[variant]), str(chosen[variant]), summary)
            )
        report = evaluation.report(self.folder, results, scores, {name: trained[variant] for name, variant in rows})
        curves = self.curves({variant: list(tried[variant]) for variant in chosen}, chosen)
        machines = self.campaign.machines(self.reported(tried))
        text = "\n\n".join(
            [*report.paragraphs, machines, *self.about_seeds(tried), *self.about_diverged(chosen), *curves]
        )
        write_text(self.folder / "table.md", text + "\n")
        write_text(self.folder / "results.csv", report.csv)
        print(f"{text}\n\ntable    {self.folder / 'table.md'}")
        if report.contact_sheet:
            save_atomically(self.folder / "sheet.png", report.contact_sheet)
            print(f"sheet    {self.folder / 'sheet.png'}")

    def reported(self, tried: Mapping[Variant, Mapping[float, float]]) -> list[Training]:
        """The trainings whose scores are in the report."""
        seeds = self.config.seeds
        trainings = [Training(v, rate, seed) for v, rates in tried.items() for rate in rates for seed in seeds]
        return [each for each in trainings if self.campaign.is_there(each, reported=True)]

    def about_seeds(self, tried: Mapping[Variant, Mapping[float, float]]) -> list[str]:
        """A sentence on how many seeds have chosen the rates, where they may be several."""
        if self.config.rate_seeds == 1:
            return []
        counts = {str(v): len(self.campaign.choosing(v, rates)) for v, rates in tried.items() if rates}
        return [f"Seeds whose mean has chosen a rate: {'; '.join(f'{name}: {n}' for name, n in counts.items())}."]

    def about_diverged(self, chosen: Mapping[Variant, RateChoice]) -> list[str]:
        """A sentence on the trainings at chosen rates that have diverged, whose seeds the tables leave out."""
        trainings = [Training(v, rate.rate, seed) for v, rate in chosen.items() for seed in self.config.seeds]
        there = [training for training in trainings if self.campaign.is_there(training, reported=True)]
        if names := [training.name for training in there if self.campaign.row(training).has_diverged]:
            return [
                f"Diverged: {', '.join(names)}. The tables leave these seeds out, of all methods; in curves they are 0."
            ]
        return []

    def summary(self, repeated: Sequence[Training]) -> dict[str, Any]:
        """The summary of trainings that differ in nothing but the seed: the first one's, with the median of COSTS."""
        found = [self.campaign.row(training).summary for training in repeated]
        return found[0] | {key: median(each[key] for each in found) for key in COSTS if key in found[0]}

    def curves(self, rates: Mapping[Variant, Sequence[float]], chosen: Mapping[Variant, RateChoice]) -> list[str]:
        """Writes curves.csv and the figures, and returns the paragraphs about them; nothing without `curves`."""
        if not self.config.curves:
            return []
        found = {variant: self.campaign.curve(variant, own) for variant, own in rates.items()}
        best = {variant: rate.rate for variant, rate in chosen.items()}
        write_text(self.folder / "curves.csv", curves_csv(found))
        try:
            for file in plot_curves(found, best, self.evaluation.score_title, self.folder):
                print(f"figure   {file}")
        except ModuleNotFoundError as error:
            log.warning("The figures are left out: they need %s (pip install 'dora_mm[eval]').", error.name)
        return curves_paragraphs(found, best, self.config.ranks, self.evaluation.score_title)


def describe_plan(config: CompareConfig) -> str:
    """What a comparison would train, for a dry run: fewer where its folder has some, more where rates are extended."""
    candidates = candidate_rates(config.learning_rates, compared(config))
    lines = [f"{variant}: {', '.join(f'{rate:g}' for rate in sorted(rates))}" for variant, rates in candidates.items()]
    tuned = sum(map(len, candidates.values())) * config.rate_seeds
    repeated = len(candidates) * len(config.seeds)
    extra = f"; up to {config.extra_rates} more rates at an end that is best" if config.extra_rates else ""
    return "\n".join(
        [
            *(f"rates     {line}" for line in lines),
            f"trainings {tuned} to choose the rates, and then {repeated}, some of which may be there{extra}",
            f"steps     {config.steps} each: at most {(tuned + repeated) * config.steps:,}, {config.workers} at a time",
            f"folder    {config.output}",
        ]
    )

"""The search for a learning rate and a rank: trainings by successive halving, as a campaign, and what is reported."""

import logging
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from dora_mm.config.loader import ConfigError, differing_keys, dump_config, load_config
from dora_mm.config.paths import resolve_path
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.studies.campaigns.campaign import Campaign
from dora_mm.studies.campaigns.halving import Candidate, Rung, halving, planned
from dora_mm.studies.campaigns.selection_metrics import SelectionMetric
from dora_mm.studies.campaigns.trainings import Training
from dora_mm.studies.campaigns.tuned import (
    RANKED,
    TunedTrainings,
    as_overrides,
    changes_for,
    check_trainings,
    training_of,
)
from dora_mm.studies.config import TuneConfig
from dora_mm.studies.curves import RateCurve, curves_csv, shown
from dora_mm.studies.plots import plot_curves
from dora_mm.studies.variants import Variant
from dora_mm.utils.atomic import write_text
from dora_mm.utils.shell import comment, quoted
from dora_mm.utils.tables import markdown_records
from dora_mm.utils.yaml12 import KeyPath, edited, read

log = logging.getLogger(__name__)
DIVERGED = "diverged"
BETTER, WORSE, INDISTINCT = "better", "worse", "not distinguishable"  # a training, from the bare model


class Tuning:
    """The trainings of a search, as a campaign, and its report.

    Args:
        config: The config.
        selection_metric: What is trained, and how it is scored.

    Raises:
        ValueError: The config of a training is invalid; also as in `Campaign`.
    """

    def __init__(self, config: TuneConfig, selection_metric: SelectionMetric):
        self.config, self.selection_metric, self.base = config, selection_metric, selection_metric.trained.base
        self.candidates = candidates_of(config, self.base)
        check_trainings(config, selection_metric.trained, self.candidates)
        self.campaign = Campaign(config, selection_metric, (self.base.seed,))
        self.folder = self.campaign.folder

    def search(self) -> list[Rung]:
        """Trains what is missing.

        Raises:
            ValueError: A training reported a user's mistake, all have diverged, or the scores do not differ.
            RuntimeError: A training failed in any other way.
        """
        record = OPTIMIZERS[self.base.optimizer.name]
        settings: dict[str, Any] = {"extra": self.config.extra_rates, "rates": (record.least_lr, record.most_lr)}
        return halving(self.candidates, self.selection_metric.trained.steps, self.measure, **settings)

    def measure(self, steps: int, candidates: Sequence[Candidate]) -> Rung:
        """Trains candidates for so many steps, and scores them."""
        trainings = {each: training_of(self.base, each, steps) for each in candidates}
        missing = [each for each in trainings.values() if not self.campaign.is_there(each, reported=True)]
        log.info("Trainings of %d steps: %d, of which %d are to do", steps, len(trainings), len(missing))
        self.campaign.finish(list(trainings.values()), reported=True)
        rows = {each: self.campaign.row(training) for each, training in trainings.items()}
        scores = {each: -inf if row.has_diverged else row.number for each, row in rows.items()}
        if len(scores) > 1 and len(set(scores.values())) == 1 and -inf not in scores.values():
            raise ValueError(
                f"all {len(scores)} trainings of {steps} steps have the score {next(iter(scores.values())):g}, which "
                "says nothing about their rates: --selection-metric held_out, or more train.steps"
            )
        highest = max(scores.values())
        if highest == -inf:
            return Rung(steps, scores)
        rung = Rung(
            steps,
            scores,
            self.selection_metric.slack(self.folder, highest),
            self.selection_metric.has_learned(self.folder, highest),
        )
        if not rung.learned:
            log.info("No training of %d steps has a better score than the bare model: more steps may tell", steps)
        return rung

    # --- the report --------------------------------------------------------------------------------------------------

    def report(self, rungs: Sequence[Rung]) -> None:
        """Writes table.md, curves.csv, figures, a contact sheet of images and tuned.yaml, and prints what was chosen.

        Args:
            rungs: As `search` returns them.

        Raises:
            ValueError: Nothing is chosen, since no training has learned anything. All but tuned.yaml is written.
        """
        chosen, trained = rungs[-1].order[0], self.trained(rungs)
        curves = self.curves(trained)
        compared = self.compared(rungs, curves) if rungs[-1].learned else None
        result = [self.about_chosen(rungs), *([self.about_band(curves[compared], compared)] if compared else [])]
        text = "\n\n".join([self.about(), markdown_records(self.table(rungs)), " ".join(result)])
        write_text(self.folder / "table.md", text + "\n")
        write_text(self.folder / "curves.csv", curves_csv(curves))
        print(f"{text}\n\ntable    {self.folder / 'table.md'}")
        try:
            best = dict.fromkeys(curves, chosen.rate)
            for file in plot_curves(curves, best, self.selection_metric.score_title, self.folder, band_of=compared):
                print(f"figure   {file}")
        except ModuleNotFoundError as error:
            log.warning("The figures are left out: they need %s (pip install 'dora_mm[eval]').", error.name)
        if (page := self.selection_metric.contact_sheet(self.folder, trained)) is not None:
            save_atomically(self.folder / "sheet.png", page)
            print(f"sheet    {self.folder / 'sheet.png'}")
        if not rungs[-1].learned:
            raise ValueError(self.about_chosen(rungs))
        file = write_tuned(self.config, self.base, chosen, self.folder / "tuned.yaml")
        adapter = self.campaign.trainings.adapter(training_of(self.base, chosen, rungs[-1].steps))
        print(f"adapter  {adapter}\n" if adapter.is_dir() else "", f"config   {file}\n", sep="")
        print(f"To train with what was chosen: dora-mm train {quoted(file)}")

    def trained(self, rungs: Sequence[Rung]) -> list[Training]:
        """The trainings that have scores, rung by rung."""
        found = [training_of(self.base, each, rung.steps) for rung in rungs for each in sorted(rung.scores)]
        return [training for training in found if self.campaign.has_scores(training)]

    def curves(self, trained: Sequence[Training]) -> dict[Variant, RateCurve]:
        """The scores over the rates, by rank and length."""
        rates: dict[Variant, list[float]] = {}
        for training in trained:
            rates.setdefault(training.variant, []).append(training.rate)
        return {variant: self.campaign.curve(variant, own) for variant, own in rates.items()}

    def about(self) -> str:
        """The caption of the table: the score, its intervals and a remark."""
        selection_metric = self.selection_metric
        brackets = f" In brackets: 95 % intervals over {selection_metric.groups}." if selection_metric.groups else ""
        about = f"Score: {selection_metric.score_title}. The schedule of each training ends at its last step.{brackets}"
        return f"{about} {selection_metric.remark(self.folder)}".strip()

    def table(self, rungs: Sequence[Rung]) -> list[dict[str, str]]:
        """A row per training."""
        found = []
        for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
            goes_on = following.scores if following else rung.order[:1] if rung.learned else []
            for each in sorted(rung.scores):
                row = {"steps": f"{rung.steps}", "rank": f"{each.rank or '-'}", "rate": f"{each.rate:g}"}
                word = ("goes on" if following else "chosen") if each in goes_on else ""
                gained = {"against the bare model": self.difference(each, rung)} if self.has_verdicts(rung) else {}
                found.append({**row, "score": self.score(each, rung), **gained, "": word})
        return found

    def score(self, candidate: Candidate, rung: Rung) -> str:
        """The score of a training, with its interval where it has one."""
        if rung.scores[candidate] == -inf:
            return DIVERGED
        if not self.selection_metric.groups:
            return f"{rung.scores[candidate]:.5f}"
        training = training_of(self.base, candidate, rung.steps)
        return shown(self.campaign.curve(training.variant, [training.rate]).points[training.rate].ci)

    def has_verdicts(self, rung: Rung) -> bool:
        """Whether trainings can be compared with the bare model."""
        return any(self.gain(each, rung) for each in rung.alive)

    def verdict(self, candidate: Candidate, rung: Rung) -> str:
        """Whether a training is better than the bare model, by the interval of the difference."""
        if rung.scores[candidate] == -inf:
            return DIVERGED
        if (gain := self.gain(candidate, rung)) is None:
            return ""
        if not gain.has_ends:
            return f"{gain.mean:+.5f}"
        return (BETTER if gain.mean > 0 else WORSE) if gain.excludes_zero else INDISTINCT

    def difference(self, candidate: Candidate, rung: Rung) -> str:
        """The verdict, with the difference and its interval where it has one."""
        verdict, gain = self.verdict(candidate, rung), self.gain(candidate, rung)
        if verdict == DIVERGED or gain is None or not gain.has_ends:
            return verdict
        return f"{verdict}: {gain.text('{:+.3f}')}"

    def gain(self, candidate: Candidate, rung: Rung) -> ConfidenceInterval | None:
        """The difference of a training's score from that of the bare model; None: the bare model has none."""
        training = training_of(self.base, candidate, rung.steps)
        return self.selection_metric.gain(self.campaign.trainings, training)

    def compared(self, rungs: Sequence[Rung], curves: dict[Variant, RateCurve]) -> Variant | None:
        """The longest trainings of the chosen rank that several rates have; None: there are none, or no intervals."""
        variants = [training_of(self.base, rungs[-1].order[0], rung.steps).variant for rung in reversed(rungs)]
        several = [each for each in variants if each in curves and len(curves[each].points) > 1]
        return several[0] if several and self.selection_metric.groups else None

    def about_band(self, curve: RateCurve, variant: Variant) -> str:
        """Which rates are as good in these trainings."""
        low, high = (2**end for end in curve.band)
        return (
            f"Rates from {low:.2g} to {high:.2g} are as good, as far as these scores can tell ({variant.setting}): "
            "there the score is less than half a confidence interval below the best."
        )

    def about_chosen(self, rungs: Sequence[Rung]) -> str:
        """The chosen rate, with a notice if it is at an end of the tried range."""
        if not rungs[-1].learned:
            return (
                f"nothing is chosen, since no training of {rungs[-1].steps} steps has learned anything: "
                f"{advice({each.rate: self.verdict(each, rungs[-1]) for each in rungs[-1].scores})}"
            )
        chosen = rungs[-1].order[0]
        rank = f" at rank {chosen.rank}" if self.config.ranks else ""
        rates = sorted(each.rate for each in rungs[0].scores if each.rank == chosen.rank)
        if len(rates) < 2 or chosen.rate not in (rates[0], rates[-1]):
            return f"Chosen: {chosen.rate:g}{rank}."
        end = "lowest" if chosen.rate == rates[0] else "highest"
        return f"Chosen: {chosen.rate:g}{rank}, the {end} that was tried: a better one may lie beyond it (--rates)."


def advice(verdicts: Mapping[float, str]) -> str:
    """What to try where nothing was learned: rates that are worse than the bare model are too high.

    Args:
        verdicts: Of each rate, how its training compares with the bare model.
    """
    worse = min((rate for rate, verdict in verdicts.items() if verdict in (WORSE, DIVERGED)), default=None)
    if worse is None:
        return "give more train.steps, or higher rates"
    lower = max((rate for rate in verdicts if rate < worse), default=None)
    if lower is None:
        return f"a rate of {worse:g} is worse than the bare model: give lower rates"
    return (
        f"a rate of {worse:g} is worse than the bare model, and {lower:g} is {INDISTINCT} from it: give rates "
        "between them, or more train.steps"
    )


def describe_plan(config: TuneConfig, trained: TunedTrainings) -> str:
    """What a search would train, for a dry run."""
    num_candidates = len(candidates_of(config, trained.base))
    lowest, highest = (
        planned(trained.steps, num_candidates, config.extra_rates, learned=learned) for learned in (True, False)
    )
    times = sum(length * count for length, count in lowest.items()) / trained.steps
    extra = f"; up to {2 * config.extra_rates} more rates where an end is as good as any" if config.extra_rates else ""
    return "\n".join(
        [
            f"rates     {', '.join(f'{rate:g}' for rate in config.rates)}",
            *([f"ranks     {', '.join(map(str, config.ranks))}"] if config.ranks else []),
            f"trainings {_trainings(lowest, trained.steps)}{extra}",
            *(
                [f"at most   {_trainings(highest, trained.steps)}: all go on while none has learned anything"]
                if highest != lowest
                else []
            ),
            f"time      {times:.3g} times that of one training or more, which its dry run estimates: "
            f"dora-mm train {quoted(config.base)} --dry-run",
            f"folder    {config.output}",
        ]
    )


def _trainings(plan: Mapping[int, int], steps: int) -> str:
    """How many trainings of how many steps there are, and how long that is."""
    total = sum(length * count for length, count in plan.items())
    parts = ", ".join(f"{count} of {length} steps" for length, count in plan.items())
    return f"{parts}: {total:,} steps, {total / steps:.3g} times one training"


def candidates_of(config: TuneConfig, base: Any) -> list[Candidate]:
    """All ranks with all rates."""
    ranks = (config.ranks or (base.adapter.rank,)) if base.adapter.method in RANKED else (None,)
    return [Candidate(rank, rate) for rank in ranks for rate in config.rates]


def write_tuned(config: TuneConfig, base: Any, chosen: Candidate, file: Path) -> Path:
    """Writes the base config with what was chosen, and with the overrides of the search; its comments stay.

    Args:
        config: The config of the search.
        base: The base config, with the overrides.
        chosen: What was chosen.
        file: The new config.
    """
    changes = changes_for(base, chosen)
    wanted = load_config(config.base, [*config.overrides, *as_overrides(base, changes)])
    given: dict[KeyPath, Any] = {("name",): base.name}
    for text in config.overrides:
        key, _, value = text.partition("=")
        given[tuple(int(part) if part.isdigit() else part for part in key.split("."))] = read(value).value
    about = f"dora-mm train {quoted(file)}\n\n{config.base}, with what dora-mm tune has chosen."
    head = f"{comment(about)}\n"
    text = edited(resolve_path(config.base).read_text(encoding="utf-8-sig"), given | changes)
    write_text(file, f"{head}#\n{text}" if text.startswith("#") else head + text)
    try:
        is_same = not differing_keys(load_config(file), wanted)
    except ConfigError:
        is_same = False
    if not is_same:  # an override that takes the place of another key, such as train.steps of train.epochs
        write_text(file, head + dump_config(wanted))
    return file

"""The committed rows of campaigns as curves, best rates and differences. No model is loaded."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np

from dora_mm.config.loader import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.splits import open_texts, training_texts
from dora_mm.eval.images.scores import Scores
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.eval.vl.confidence_intervals import AnswerScores, answer_scores, group_cells, groups_of
from dora_mm.eval.vl.question_only import question_only_answers
from dora_mm.studies.campaigns.rates import best_rate
from dora_mm.studies.campaigns.training_rows import TrainingRow, TrainingRows
from dora_mm.studies.config import CompareConfig
from dora_mm.studies.curves import CurvePoint, RateCurve, difference, percentiles, widths
from dora_mm.studies.variants import Variant

RESULTS = Path(__file__).parent.parent / "results" / "paper"


@dataclass(frozen=True)
class Study:
    """The rows of a campaign.

    Attributes:
        name: The model that was trained.
        rows: A row per training.
        cells: Returns a score per thing, or group of answers, of the scores of a row, (K,).
        rate_seeds: The seeds by which rates were chosen.
    """

    name: str
    rows: Sequence[TrainingRow]
    cells: Callable[[str], np.ndarray]
    rate_seeds: Sequence[int] = (0,)

    @cached_property
    def curves(self) -> dict[Variant, RateCurve]:
        """The scores over learning rates by variant."""
        found: dict[Variant, dict[float, dict[int, np.ndarray | None]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.rows:
            training, cells = row.training, None if row.has_diverged else self.cells(row.scores)
            found[training.variant][training.rate][training.seed] = cells
        return {variant: RateCurve.of(own) for variant, own in found.items()}

    @cached_property
    def best(self) -> dict[Variant, float]:
        """The rates that were chosen, on other things or questions than the reported ones."""
        return {variant: best_rate(self.tried(variant)) for variant in self.values}

    @cached_property
    def values(self) -> dict[Variant, dict[float, dict[int, float]]]:
        """What rates were chosen by, by variant, rate and seed."""
        found: dict[Variant, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.rows:
            if row.value and row.training.seed in self.rate_seeds:
                found[row.training.variant][row.training.rate][row.training.seed] = row.number
        return found

    def choosing(self, variant: Variant) -> list[int]:
        """The seeds by which a rate was chosen: those that have tried all of them."""
        return [seed for seed in self.rate_seeds if all(seed in own for own in self.values[variant].values())]

    def tried(self, variant: Variant) -> dict[float, float]:
        """The mean of these seeds by rate."""
        seeds = self.choosing(variant)
        return {rate: fmean(own[seed] for seed in seeds) for rate, own in self.values[variant].items()}

    @cached_property
    def preferred(self) -> dict[Variant, float]:
        """The rates with the highest mean of all seeds on what is reported, which is too good, for all alike."""
        seeds = {v: max(len(point.seeds) for point in curve.points.values()) for v, curve in self.curves.items()}
        return {
            variant: best_rate(
                {
                    rate: float(point.cells_KS.mean())
                    for rate, point in curve.points.items()
                    if len(point.seeds) == seeds[variant]
                }
            )
            for variant, curve in self.curves.items()
        }

    @cached_property
    def widths(self) -> dict[Variant, tuple[float, np.ndarray]]:
        """The width of the band of rates that are as good as the best, in doublings, with its resamples."""
        return {variant: widths(curve) for variant, curve in self.curves.items()}

    def at(self, variant: Variant, rate: float | None = None) -> CurvePoint:
        """The scores of a variant at a rate; None: at its best one."""
        return self.curves[variant].points[self.best[variant] if rate is None else rate]

    def around(self, variant: Variant) -> CurvePoint:
        """The scores at the best rate and its neighbours."""
        return self.curves[variant].ci_around(self.best[variant])

    def less(self, first: Variant, second: Variant, rate: float | None = None) -> ConfidenceInterval:
        """The paired difference of two variants at a rate; None: each at its best one."""
        return difference(self.at(first, rate), self.at(second, rate))

    def width_less(self, first: Variant, second: Variant) -> ConfidenceInterval:
        """The difference of the widths of two bands."""
        (ours, resampled), (theirs, others) = self.widths[first], self.widths[second]
        return percentiles(ours - theirs, resampled - others)


def rows_of(name: str) -> list[TrainingRow]:
    """The rows of a file in results/paper."""
    return list(TrainingRows(RESULTS / name, lambda _: "").found.values())


def bricks(*names: str) -> Study:
    """The campaign on bricks: of `tuned/trainings.csv`, and of the candidates, whose rows no config has any more."""
    return Study("SDXL", [row for name in names for row in rows_of(name)], brick_cells)


def brick_cells(text: str) -> np.ndarray:
    """The probability of the style, divided by the rank of the thing, of each thing, (K,)."""
    return Scores.from_json(text).soft_both("brick")[:, 0]


def scenes() -> tuple[Study, AnswerScores]:
    """The campaign on questions about scenes, and the scores of answers to the reported ones without the image."""
    config = load_config("configs/vl_bart/tuned.yaml")
    assert isinstance(config, CompareConfig)
    assert config.vl is not None
    base = load_config(config.base)
    assert isinstance(base, TrainVLConfig)
    (task,), (reported,) = base.data.all_tasks, config.vl.report.all_tasks
    assert reported.valid is not None
    questions = list(open_texts(reported.valid, base.data))
    guesses = question_only_answers(training_texts(task, base.data), questions)
    alone, groups = answer_scores("vqa", [list(zip(questions, guesses, strict=True))]), groups_of("vqa", questions)
    assert alone is not None

    def cells(text: str) -> np.ndarray:
        return group_cells([AnswerScores(np.array(json.loads(text)["vqa"])[:, None], groups)])[:, 0]

    seeds = config.seeds[: config.rate_seeds]
    return Study("VL-BART", rows_of("tuned_vl/trainings.csv"), cells, seeds), alone

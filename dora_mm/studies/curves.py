"""How the score of a method depends on its learning rate: best rates, bands of rates that are as good, differences.

Shapes: K things (or other groups of answers), S seeds, R rates, N resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dora_mm.eval.statistics import LEVEL, NUM_RESAMPLES, ConfidenceInterval, columns, holm, mean_ci, paired_difference
from dora_mm.studies.variants import NAMES, Variant, contrasts
from dora_mm.utils.tables import csv_records, markdown_records

EXPLAINED = """Score: {title}. As good: the rates around the highest score of the first seed's curve that lose less than
half the width of that score's interval, between rates interpolated along their logarithm; > and <: the band reaches the
end of what was tried. Width: of that band in doublings of the rate. Around: the mean of the best rate and its two
neighbours, which are others where best rates differ. In brackets: 95 % intervals over things or images and, where there
are several, trainings; widths and best rates over things alone, of the first seed. Differences are of the same things
or images and the same seeds, which draw the same A, batches and noise; trainings of one seed are still no twins, least
of all on different processors, whose rounding differs. p: of the difference at the best rates, and by Holm's correction
for all of these."""

SCORES = (0.0, np.inf)  # the lowest and the highest possible one; CIDEr can be above 1


class CurvePoint(NamedTuple):
    """The scores at one learning rate."""

    cells_KS: np.ndarray  # one score per thing and training
    seeds: tuple[int, ...]  # the S seeds of the trainings

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        """The scores of some of the seeds, (K, S)."""
        return self.cells_KS[:, [self.seeds.index(seed) for seed in seeds]]

    @property
    def ci(self) -> ConfidenceInterval:
        """The mean score with its interval."""
        return mean_ci(self.cells_KS, bounds=SCORES)


@dataclass(frozen=True)
class RateCurve:
    """The scores of a method over its learning rates.

    Attributes:
        points: By rate, ascending. All have the same things, and the first seed in common.
    """

    points: Mapping[float, CurvePoint]

    @classmethod
    def of(cls, cells_K: Mapping[float, Mapping[int, np.ndarray | None]]) -> "RateCurve":
        """The curve of scores per thing, (K,), by rate and seed; None: of a training that has diverged, which are 0."""
        diverged = np.zeros_like(next(c for own in cells_K.values() for c in own.values() if c is not None))
        return cls(
            {
                rate: CurvePoint(np.stack([diverged if c is None else c for c in own.values()], axis=1), tuple(own))
                for rate, own in sorted(cells_K.items())
            }
        )

    @property
    def log2_rates(self) -> np.ndarray:
        """The binary logarithms of the rates, (R,)."""
        return np.log2(list(self.points))

    @property
    def first_KR(self) -> np.ndarray:
        """The scores of the first seed."""
        return np.stack([point.cells_KS[:, 0] for point in self.points.values()], axis=1)

    @property
    def half_width(self) -> float:
        """Half the width of the interval of the highest score of the first seed."""
        highest = self.first_KR[:, [int(self.first_KR.mean(axis=0).argmax())]]
        found = mean_ci(highest, bounds=SCORES)
        return (found.high - found.low) / 2

    @property
    def band(self) -> tuple[float, float]:
        """The binary logarithms of the ends of the range of rates that are as good as the best of the first seed."""
        low, high = band(self.log2_rates, self.first_KR.mean(axis=0)[None], self.half_width)[:, 0]
        return float(low), float(high)

    def open_ends(self) -> list[float]:
        """The lowest and the highest rate, as far as they are as good as the best: the band may go on beyond them."""
        rates, (low, high) = list(self.points), self.band
        ends = ((rates[0], low <= self.log2_rates[0]), (rates[-1], high >= self.log2_rates[-1]))
        return [rate for rate, is_open in ends if is_open]

    def ci_around(self, rate: float) -> CurvePoint:
        """The mean of the scores at a rate and its neighbours, of the seeds that all of these have."""
        rates = list(self.points)
        index = rates.index(rate)
        near = [self.points[each] for each in rates[max(index - 1, 0) : index + 2]]
        seeds = common_seeds(near)
        return CurvePoint(np.mean([point.of(seeds) for point in near], axis=0), seeds)


def common_seeds(points: Sequence[CurvePoint]) -> tuple[int, ...]:
    """The seeds that all points have, in the order of the first one's."""
    return tuple(seed for seed in points[0].seeds if all(seed in point.seeds for point in points))


def difference(first: CurvePoint, second: CurvePoint) -> ConfidenceInterval:
    """The paired difference first - second over the seeds that both have."""
    seeds = common_seeds([first, second])
    return paired_difference(first.of(seeds), second.of(seeds))


def band(log2_rates: np.ndarray, means_NR: np.ndarray, depth: float) -> np.ndarray:
    """The ranges around the highest scores in which the score is at most `depth` below these.

    Between two rates the score is interpolated along the logarithm of the rate.

    Args:
        log2_rates: The binary logarithms of the rates, (R,).
        means_NR: The scores of N curves.
        depth: Of all of them.

    Returns:
        The binary logarithms of their ends, (2, N); that of the first or the last rate where a range reaches it.
    """
    N, R = means_NR.shape
    rows, best, least_N = np.arange(N), means_NR.argmax(axis=1), means_NR.max(axis=1) - depth

    def ends(step: int) -> np.ndarray:
        inside = best
        for _ in range(R - 1):
            beyond = np.clip(inside + step, 0, R - 1)
            inside = np.where(means_NR[rows, beyond] >= least_N, beyond, inside)
        outside = np.clip(inside + step, 0, R - 1)
        fall = means_NR[rows, inside] - means_NR[rows, outside]  # 0 at the first and the last rate
        share = np.divide(means_NR[rows, inside] - least_N, fall, out=np.zeros(N), where=fall > 0)
        return log2_rates[inside] + share * (log2_rates[outside] - log2_rates[inside])

    return np.stack([ends(-1), ends(1)])


def resampled_means(cells_KR: np.ndarray) -> np.ndarray:
    """Bootstrap resamples of the mean over things, (N, R); equal things give paired resamples."""
    num_things = len(cells_KR)
    counts = np.random.default_rng(0).multinomial(num_things, np.full(num_things, 1 / num_things), NUM_RESAMPLES)
    return counts / num_things @ cells_KR


def widths(curve: RateCurve) -> tuple[float, np.ndarray]:
    """The width of the band in doublings of the rate, and its resamples (N,), all with the depth of the curve."""
    low, high = band(curve.log2_rates, resampled_means(curve.first_KR), curve.half_width)
    return curve.band[1] - curve.band[0], high - low


def percentiles(value: float, resamples: np.ndarray) -> ConfidenceInterval:
    """A value with the percentile interval of its resamples."""
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return ConfidenceInterval(value, float(low), float(high))


def rate_per_doubling(curves: Mapping[int, RateCurve]) -> ConfidenceInterval:
    """By how many doublings the rate of the highest score moves per doubling of the rank: the least-squares slope.

    Args:
        curves: By rank, two or more, of the same things.
    """
    ranks = np.log2(list(curves))
    centered = (ranks - ranks.mean()) / ((ranks - ranks.mean()) ** 2).sum()
    best = np.array([curve.log2_rates[curve.first_KR.mean(axis=0).argmax()] for curve in curves.values()])
    resampled = np.stack([c.log2_rates[resampled_means(c.first_KR).argmax(axis=1)] for c in curves.values()])
    return percentiles(float(centered @ best), centered @ resampled)


def curves_csv(curves: Mapping[Variant, RateCurve]) -> str:
    """The text of a CSV file with a row per variant and rate."""
    return csv_records(
        [
            {
                "name": str(variant),
                "learning_rate": f"{rate:g}",
                "trainings": str(len(point.seeds)),
                "first_seed": f"{point.cells_KS[:, 0].mean():.4f}",
                **columns(point.ci, "{:.4f}"),
            }
            for variant, curve in curves.items()
            for rate, point in curve.points.items()
        ]
    )


def curves_paragraphs(
    curves: Mapping[Variant, RateCurve], best: Mapping[Variant, float], ranks: Sequence[int], title: str
) -> list[str]:
    """The paragraphs about curves: what they mean, each variant, paired differences, and how the best rate moves.

    Args:
        curves: By variant, of the same things.
        best: The chosen rate of each.
        ranks: The ranks that are compared.
        title: What the scores are.
    """
    found = {variant: widths(curve) for variant, curve in curves.items()}
    rows = [_about(variant, curve, best[variant], found[variant]) for variant, curve in curves.items()]
    compared, chosen = contrasts(ranks, curves), {variant: curves[variant].points[best[variant]] for variant in curves}
    corrected = with_holm([difference(chosen[first], chosen[second]) for first, second in compared])
    pairs = [
        _compared(first, second, curves, best, p, found[first], found[second])
        for (first, second), p in zip(compared, corrected, strict=True)
    ]
    moves = []
    for method in ("lora", "dora"):
        own = {v.rank: curve for v, curve in sorted(curves.items(), key=str) if v.method == method and not v.setting}
        by_rank = {rank: own[rank] for rank in sorted(rank for rank in own if rank)}
        if len(by_rank) > 1:
            moves.append(f"{NAMES[method]} {shown(rate_per_doubling(by_rank), 2)}")
    sentence = "Doublings of the rate with the highest score per doubling of the rank: " + "; ".join(moves) + "."
    tables = [markdown_records(table) for table in (rows, pairs) if table]
    return [EXPLAINED.format(title=title), *tables, *([sentence] if moves else [])]


def with_holm(differences: Sequence[ConfidenceInterval]) -> list[str]:
    """P values as text, with what Holm's correction makes of them together: "0.0035 (0.021)"."""
    p_values = [each.p for each in differences]
    return [f"{p:.2g} ({corrected:.2g})" for p, corrected in zip(p_values, holm(p_values), strict=True)]


def _about(variant: Variant, curve: RateCurve, rate: float, width: tuple[float, np.ndarray]) -> dict[str, str]:
    low, high = curve.band
    below = "< " if low <= curve.log2_rates[0] else ""
    above = " >" if high >= curve.log2_rates[-1] else ""
    point = curve.points[rate]
    return {
        "": str(variant),
        "best rate": f"{rate:g}",
        "trainings": str(len(point.seeds)),
        "score": shown(point.ci),
        "around": shown(curve.ci_around(rate).ci),
        "as good": f"{below}{2**low:.2g} to {2**high:.2g}{above}",
        "width": shown(percentiles(*width), 1),
    }


def _compared(
    first: Variant,
    second: Variant,
    curves: Mapping[Variant, RateCurve],
    best: Mapping[Variant, float],
    p: str,
    first_width: tuple[float, np.ndarray],
    second_width: tuple[float, np.ndarray],
) -> dict[str, str]:
    ours, theirs = curves[first], curves[second]

    def at(our_rate: float, their_rate: float) -> str:
        if our_rate not in ours.points or their_rate not in theirs.points:
            return "-"
        return marked(difference(ours.points[our_rate], theirs.points[their_rate]))

    width = percentiles(first_width[0] - second_width[0], first_width[1] - second_width[1])
    return {
        "difference": f"{first} - {second}",
        "each at its best rate": at(best[first], best[second]),
        "p (Holm)": p,
        "around": marked(difference(ours.ci_around(best[first]), theirs.ci_around(best[second]))),
        "both at the first one's": at(best[first], best[first]),
        "both at the second one's": at(best[second], best[second]),
        "width": marked(width, 1),
    }


def shown(ci: ConfidenceInterval, digits: int = 3) -> str:
    """Returns "0.512 (0.401 to 0.623)"."""
    return ci.text(f"{{:.{digits}f}}")


def marked(ci: ConfidenceInterval, digits: int = 3) -> str:
    """The interval, with a ! where it excludes 0."""
    return shown(ci, digits) + " !" * ci.excludes_zero

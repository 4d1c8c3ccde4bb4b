"""Confidence intervals and distances for small samples.

Shapes: K concepts (or other groups of answers), S seeds or training runs, N samples, D dimensions. How often the
intervals miss is counted by `python -m tests.benchmarks.bench_coverage`, whose tables lie in results/coverage there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, binomtest, t

NUM_RESAMPLES = 2000
LEVEL = 0.95
LEAST_GROUPS = 20  # of fewer independent answers nothing is concluded: of 19 halves of 0 and 1 it is 24 to 76
TAIL = (1.0 - LEVEL) / 2


@dataclass(frozen=True)
class ConfidenceInterval:
    """An estimate with its 95 % confidence interval.

    Attributes:
        mean: The estimate.
        low: The lower end; NaN: it has no interval.
        high: The upper end; NaN likewise.
        p: The probability of an estimate that is as far from 0 where the truth is 0, of means; NaN: it is not known.
    """

    mean: float
    low: float = nan
    high: float = nan
    p: float = nan

    @property
    def has_ends(self) -> bool:
        """Whether there is an interval, and not the estimate alone."""
        return not isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float | None]:
        """The estimate and its ends, which are None where it has none."""
        low, high = (self.low, self.high) if self.has_ends else (None, None)
        return {"mean": self.mean, "low": low, "high": high}

    def text(self, form: str = "{:.2f}", scale: float = 1.0) -> str:
        """The estimate and its ends times `scale`, such as "0.51 (0.40 to 0.62)"."""
        ends = [form.format(scale * value) for value in (self.mean, self.low, self.high)]
        return f"{ends[0]} ({ends[1]} to {ends[2]})" if self.has_ends else ends[0]


def columns(ci: ConfidenceInterval | None, form: str, scale: float = 1.0) -> dict[str, str]:
    """The estimate and its ends times `scale` as cells of a CSV file, which are empty where there is none."""
    found = ci.as_dict() if ci else dict.fromkeys(("mean", "low", "high"))
    return {name: "" if value is None else form.format(scale * value) for name, value in found.items()}


class Spread(NamedTuple):
    """The variance of an estimate, and the degrees of freedom with which it is known."""

    variance: float
    freedom: float

    def ci_around(self, mean: float, bounds: tuple[float, float] = (-np.inf, np.inf)) -> ConfidenceInterval:
        """The t interval of an estimate, clipped to its lowest and highest possible value."""
        half_width = float(t.ppf(1.0 - TAIL, self.freedom) * np.sqrt(self.variance))
        return ConfidenceInterval(mean, max(mean - half_width, bounds[0]), min(mean + half_width, bounds[1]))

    def p_value(self, mean: float) -> float:
        """The two-sided p value of the t test that the truth is 0."""
        if not self.variance:
            return float(mean == 0)
        return float(2 * t.sf(abs(mean) / np.sqrt(self.variance), self.freedom))


def mean_ci(
    values_KS: np.ndarray, *, over_runs: bool = True, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> ConfidenceInterval:
    """Returns the 95 % t interval of the mean: what other concepts, and other training runs, would give.

    Where all values are -1, all 0 or all 1, as differences of shares can be, it is the binomial one of K concepts.

    Of normal values of 5 to 40 concepts it misses 4.2 to 5.8 % (nominal 5), of skewed ones 5.1 to 6.4 %; the percentile
    bootstrap 16, 11, 8 % of 5, 8, 24 concepts. With 40 concepts and 3 runs 1.4, 4.4, 5.1, 4.7 % where runs differ by 0,
    0.2, 0.5, 1 standard deviations of the noise of single images; 2.6, 4.2, 6.5, 7.3 % where concepts differ as well.

    Args:
        values_KS: One value per concept and seed, (K, S).
        over_runs: Whether each column is a separate training run; else they are further seeds of one model.
        bounds: The lowest and highest possible mean, to which the interval is clipped.

    Returns:
        The interval; without ends where there is a single concept.
    """
    mean, K = float(values_KS.mean()), len(values_KS)
    if K < 2:
        return ConfidenceInterval(mean)
    if mean in (-1.0, 0.0, 1.0) and np.all(values_KS == mean):
        half_width = 1.0 - _least_share(K)
        p = 2 * 0.5**K if mean else 1.0  # of the sign test
        return ConfidenceInterval(mean, max(mean - half_width, bounds[0]), min(mean + half_width, 1.0), p)
    spread = mean_spread(values_KS, over_runs=over_runs)
    return replace(spread.ci_around(mean, bounds), p=spread.p_value(mean))


def share_ci(values_KS: np.ndarray, *, over_runs: bool = True, least: float | None = None) -> ConfidenceInterval:
    """Returns the 95 % interval of a share: the exact binomial one (Clopper and Pearson, 1934) of K values of 0 or 1.

    With several seeds or runs it is that of the number of independent values with the same variance of the mean (Korn
    and Graubard, 1998, Survey Methodology 24). It never excludes a share that K successes of K, or none, leave
    possible: with few failures the variance is known too badly.

    It misses 0 to 5.6 % (nominal 5) of shares of 0.5 to 0.95 of 5 to 40 concepts that differ or not, with 1 or 3 seeds,
    or 3 runs that differ; a t interval cut at 0 and 1 up to 15 %, the percentile bootstrap up to 77 %.

    Args:
        values_KS: One value from 0 to 1 per concept and seed, (K, S).
        over_runs: As in `mean_ci`.
        least: The variance that the mean has at least, that of independent values; None: of these.

    Returns:
        The interval; without ends where there is a single concept.
    """
    mean, K = float(values_KS.mean()), len(values_KS)
    if K < 2:
        return ConfidenceInterval(mean)
    possible = _least_share(K)
    if mean in (0.0, 1.0):
        return ConfidenceInterval(mean, mean * possible, mean + (1.0 - mean) * (1.0 - possible))
    spread = mean_spread(values_KS, over_runs=over_runs)
    variance = max(spread.variance, float(values_KS.var()) / (values_KS.size - 1) if least is None else least)
    known = (t.ppf(1.0 - TAIL, K - 1) / t.ppf(1.0 - TAIL, spread.freedom)) ** 2
    trials = mean * (1.0 - mean) / variance * K / (K - 1) * known if variance else K
    hits = mean * trials
    low, high = beta.ppf(TAIL, hits, trials - hits + 1.0), beta.ppf(1.0 - TAIL, hits + 1.0, trials - hits)
    return ConfidenceInterval(mean, min(float(low), possible), max(float(high), 1.0 - possible))


def _least_share(K: int) -> float:
    """The share with which K successes of K have a chance of 2.5 %."""
    return TAIL ** (1.0 / K)


def mean_spread(values_KS: np.ndarray, *, over_runs: bool) -> Spread:
    """Returns the spread of the mean over concepts and, where there are several, over training runs.

    Images of one concept are not independent, so concepts count, and not images. Concepts and runs are crossed random
    effects: the variance of the mean is the variance of the row means plus that of the column means minus the part they
    share.

    Args:
        values_KS: One value per concept and seed, (K, S), of two concepts or more.
        over_runs: As in `mean_ci`.
    """
    K, S = values_KS.shape
    mean, rows, columns = values_KS.mean(), values_KS.mean(axis=1), values_KS.mean(axis=0)
    over_concepts = Spread(float(rows.var(ddof=1)) / K, K - 1)
    if S == 1 or not over_runs:
        return over_concepts
    residuals = values_KS - rows[:, None] - columns + mean
    shared = (residuals**2).sum() / ((K - 1) * (S - 1)) / (K * S)
    return combined([over_concepts, Spread(float(columns.var(ddof=1)) / S, S - 1)], shared=float(shared))


def combined(parts: Sequence[Spread], shared: float = 0.0) -> Spread:
    """Returns the spread over several effects, with Satterthwaite's degrees of freedom.

    Args:
        parts: That over each.
        shared: A variance that is in all of them, and counts once.
    """
    variances = [part.variance for part in parts]
    variance, least = max(sum(variances) - shared, *variances), min(part.freedom for part in parts)
    weight = sum(part.variance**2 / part.freedom for part in parts)
    return Spread(variance, max(variance**2 / weight, least) if weight else least)


def paired_difference(first_KS: np.ndarray, second_KS: np.ndarray) -> ConfidenceInterval:
    """Returns the 95 % interval of first - second: `mean_ci` of the differences.

    Args:
        first_KS: One value per concept and run, (K, S).
        second_KS: The values of the other method for the same concepts and seeds, (K, S).

    Raises:
        ValueError: The shapes differ.
    """
    if first_KS.shape != second_KS.shape:
        raise ValueError(f"paired scores need the same concepts and seeds, got {first_KS.shape} and {second_KS.shape}")
    return mean_ci(first_KS - second_KS)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values that hold for all of several tests together (Holm, 1979, Scandinavian Journal of Statistics 6).

    Whatever the tests depend on, the probability that any true hypothesis gets one below 5 % is at most 5 %. What is
    not known (NaN) stays so, and counts as a test.
    """
    corrected, largest = [nan] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):  # NaN comes last
        if not isnan(p_values[index]):
            largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
            corrected[index] = largest
    return corrected


def paired_p(differences_KS: np.ndarray) -> tuple[float, bool]:
    """Returns how likely a mean difference as far from 0 is where there is none.

    Of single differences of -1, 0 and 1 by McNemar's exact test (1947): as many better as worse; else by the t test
    that belongs to `mean_ci`.

    Args:
        differences_KS: One difference per group of answers and run, (K, S).

    Returns:
        The two-sided p, and whether it is that of the exact test.
    """
    K, S = differences_KS.shape
    better, worse = int((differences_KS > 0).sum()), int((differences_KS < 0).sum())
    if S == 1 and np.isin(differences_KS, (-1.0, 0.0, 1.0)).all():
        return (float(binomtest(better, better + worse).pvalue) if better + worse else 1.0), True
    if K < 2:
        return 1.0, False
    return mean_spread(differences_KS, over_runs=True).p_value(float(differences_KS.mean())), False


def groups_needed(values_KS: np.ndarray, half_width: float) -> int | None:
    """Returns how many groups like these a 95 % t interval takes that is not wider than a wished one.

    Args:
        values_KS: One value per group and run, (K, S), of which the variance is known.
        half_width: Half the width of the interval.

    Returns:
        The number of groups, of as many answers each; None where there are fewer than two, or all values are equal.
    """
    variance = float(values_KS.mean(axis=1).var(ddof=1)) if len(values_KS) > 1 else 0.0
    if not variance:
        return None
    needed = max(2, int(variance * (t.ppf(1.0 - TAIL, np.inf) / half_width) ** 2))
    while variance * t.ppf(1.0 - TAIL, needed - 1) ** 2 > needed * half_width**2:
        needed += 1
    return needed


def jackknife(sizes: Sequence[int], statistic: Callable[..., float]) -> ConfidenceInterval:
    """Returns a statistic of all data with its 95 % t interval by the jackknife.

    For statistics that repeated rows change, as they do a mean over pairs of images in bootstrap resamples. Of a mean
    it is `mean_ci` over the same rows.

    Of variety, and of likeness among images, it misses 2.6 to 4.8 % (nominal 5) with 5 to 60 prompts or images; the
    percentile bootstrap over images 15 to 48 %, since each is in many pairs.

    Args:
        sizes: The length of each axis along which rows are left out (prompts, runs). Variances of the axes are added.
        statistic: Takes one array of indices per axis, the rows that are included, and returns a number.

    Returns:
        The interval; without ends where an axis has a single row.
    """
    every = [np.arange(size) for size in sizes]
    value = statistic(*every)
    if min(sizes) < 2:
        return ConfidenceInterval(value)
    parts = []
    for axis, size in enumerate(sizes):
        left_out = [
            statistic(*(np.delete(rows, index) if other == axis else rows for other, rows in enumerate(every)))
            for index in range(size)
        ]
        parts.append(Spread((size - 1) * float(np.var(left_out)), size - 1))
    return combined(parts).ci_around(value)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution by its mean and covariance."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D)

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Gaussian":
        """Estimates mean and covariance from features (N, D).

        Raises:
            ValueError: There are fewer than two rows.
        """
        if len(features_ND) < 2:
            raise ValueError(f"a covariance needs at least two images, got {len(features_ND)}")
        return cls(features_ND.mean(axis=0), np.cov(features_ND, rowvar=False).reshape([features_ND.shape[1]] * 2))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance of two normal distributions (Dowson and Landau, 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), computed with symmetric eigenvalue decompositions, so that
    singular covariances of few samples are fine. An estimate from N samples is too large by about tr(C) / N and a term
    that falls like D / N: compare sets of equal size only, and in few dimensions.

    It has no interval. 24 images with the distribution of a style of the classifier have 62 to 101 instead of 0, and
    around the bias-corrected estimate the jackknife misses 13 to 32 % instead of 5 (of 40 images 3 to 13 %, of 120 at
    most 6).
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0, None)).sum()
    offset = first.mean - second.mean
    total = offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return float(max(total, 0.0))

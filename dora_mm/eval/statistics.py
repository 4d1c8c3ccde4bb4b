"""Confidence intervals and distances for small samples.

Shapes: K concepts (or other groups of answers), S seeds or training runs, N samples, D dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap(values_KS: np.ndarray, *, seed: int = 0) -> Interval:
    """Returns the 95 % percentile bootstrap interval of the mean.

    Complete rows are resampled, since images of one concept are not independent. Where all values are -1, all 0 or
    all 1, no resample can differ, so the interval is then the exact binomial one, see `exact_interval`.

    Args:
        values_KS: One value per concept and seed, (K, S).
        seed: Of the resampling.
    """
    if (exact := exact_interval(values_KS, lowest=0.0)) is not None:
        return exact
    num_concepts = len(values_KS)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_concepts, np.full(num_concepts, 1.0 / num_concepts), size=NUM_RESAMPLES)
    low, high = np.quantile(counts / num_concepts @ values_KS.mean(axis=1), [(1.0 - LEVEL) / 2, (1.0 + LEVEL) / 2])
    return Interval(float(values_KS.mean()), float(low), float(high))


def exact_interval(values_KS: np.ndarray, lowest: float) -> Interval | None:
    """Returns the exact 95 % binomial interval for K independent concepts where all values are -1, all 0 or all 1.

    Args:
        values_KS: One value per concept and seed, (K, S).
        lowest: The lower bound; the upper one is 1.

    Returns:
        The interval, or None where the values differ or are other numbers.
    """
    mean = float(values_KS.mean())
    if not np.all(values_KS == values_KS.flat[0]) or mean not in (-1.0, 0.0, 1.0):
        return None
    half_width = 1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / len(values_KS))
    return Interval(mean, max(mean - half_width, lowest), min(mean + half_width, 1.0))


def crossed_interval(values_KS: np.ndarray, *, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Returns the 95 % interval of the mean where each column is a separate training run.

    It covers what another concept and another run would give. Concepts and runs are crossed random effects: the
    variance of the mean is the variance of the row means plus that of the column means minus the part they share, with
    Satterthwaite's degrees of freedom for a t interval. Where all values are -1, all 0 or all 1, the interval is the
    exact binomial one.

    Misses in 4,000 simulations with 40 concepts and 3 runs, nominal 5 %: 1.8, 4.6, 5.4, 5.2 % where runs differ by 0,
    0.2, 0.5, 1 standard deviations of the noise of single images; 4.5, 5.0, 6.2, 7.1 % where concepts differ as well.

    Args:
        values_KS: One value per concept and run, (K, S).
        bounds: The lowest and highest possible mean, to which the interval is clipped.
    """
    if (exact := exact_interval(values_KS, bounds[0])) is not None:
        return exact
    K, S = values_KS.shape
    mean, rows, columns = values_KS.mean(), values_KS.mean(axis=1), values_KS.mean(axis=0)
    row_variance, column_variance = rows.var(ddof=1) / K, columns.var(ddof=1) / S
    residuals = values_KS - rows[:, None] - columns + mean
    shared = (residuals**2).sum() / ((K - 1) * (S - 1)) / (K * S)
    variance = max(row_variance + column_variance - shared, row_variance, column_variance)
    if variance == 0.0:
        return Interval(float(mean), float(mean), float(mean))
    freedom = max(variance**2 / (row_variance**2 / (K - 1) + column_variance**2 / (S - 1)), S - 1)
    half_width = t.ppf((1.0 + LEVEL) / 2, freedom) * np.sqrt(variance)
    return Interval(float(mean), float(max(mean - half_width, bounds[0])), float(min(mean + half_width, bounds[1])))


def paired_difference(first_KS: np.ndarray, second_KS: np.ndarray) -> Interval:
    """Returns the 95 % interval of first - second: `mean_interval` of the differences.

    Args:
        first_KS: One value per concept and run, (K, S).
        second_KS: The values of the other method for the same concepts and seeds, (K, S).

    Raises:
        ValueError: The shapes differ.
    """
    if first_KS.shape != second_KS.shape:
        raise ValueError(f"paired scores need the same concepts and seeds, got {first_KS.shape} and {second_KS.shape}")
    return mean_interval(first_KS - second_KS)


def mean_interval(values_KS: np.ndarray, *, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Returns the 95 % interval of the mean over concepts and training runs, or over concepts alone of a single run.

    Args:
        values_KS: One value per concept and run, (K, S).
        bounds: As in `crossed_interval`.
    """
    if values_KS.shape[1] > 1:
        return crossed_interval(values_KS, bounds=bounds)
    found = bootstrap(values_KS)
    return Interval(found.mean, max(found.low, bounds[0]), min(found.high, bounds[1]))


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
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0, None)).sum()
    offset = first.mean - second.mean
    total = offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return float(max(total, 0.0))


def jackknife(sizes: Sequence[int], statistic: Callable[..., float]) -> Interval:
    """Returns a statistic of all data with 1.96 jackknife standard errors on either side.

    For statistics that are biased by repeated rows, as a covariance is in bootstrap resamples.

    Args:
        sizes: The length of each axis that is resampled (concepts, runs). The variances of the axes are added.
        statistic: Takes one array of indices per axis, the rows that are included, and returns a number.
    """
    all_indices = [np.arange(size) for size in sizes]
    value, variance = statistic(*all_indices), 0.0
    for axis, size in enumerate(sizes):
        left_out = [
            statistic(*(np.delete(rows, index) if other == axis else rows for other, rows in enumerate(all_indices)))
            for index in range(size)
        ]
        variance += (size - 1) * np.var(left_out)
    half_width = 1.96 * float(np.sqrt(variance))
    return Interval(value, value - half_width, value + half_width)

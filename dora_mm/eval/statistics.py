"""Intervals and distances for small samples. Shapes: K concepts, S seeds, N samples, D dimensions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap(values_KS: np.ndarray, *, seed: int = 0, lowest: float = 0.0) -> Interval:
    """95 % percentile interval of the mean, resampling whole concepts, since pictures of one concept go together.

    Where all K concepts agree on a whole number no resample can differ, so the interval is then the exact binomial
    bound for K independent concepts, from `lowest` (-1 for differences of shares) to 1.
    """
    if (certain := unanimous(values_KS, lowest)) is not None:
        return certain
    num_concepts = len(values_KS)
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(num_concepts, np.full(num_concepts, 1.0 / num_concepts), size=NUM_RESAMPLES) / num_concepts
    low, high = np.quantile(rows @ values_KS.mean(axis=1), [(1.0 - LEVEL) / 2, (1.0 + LEVEL) / 2])
    return Interval(float(values_KS.mean()), float(low), float(high))


def unanimous(values_KS: np.ndarray, lowest: float) -> Interval | None:
    mean = float(values_KS.mean())
    if not np.all(values_KS == values_KS.flat[0]) or mean not in (-1.0, 0.0, 1.0):
        return None
    reach = 1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / len(values_KS))
    return Interval(mean, max(mean - reach, lowest), min(mean + reach, 1.0))


def crossed(values_KS: np.ndarray, *, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """95 % interval of the mean where each column is a training of its own: what would a further training give?

    Things and trainings are crossed random effects: the variance of the mean is that of the row means plus that of the
    column means less their common part, with Satterthwaite's degrees of freedom for a t interval, clipped to `bounds`.
    Misses in 4,000 simulations with 40 things and 3 trainings, nominal 5 %: 1.8, 4.6, 5.4, 5.2 % where trainings differ
    by 0, 0.2, 0.5, 1 standard deviations of a picture's own noise; 4.5, 5.0, 6.2, 7.1 % where things differ as well.
    """
    if (certain := unanimous(values_KS, bounds[0])) is not None:
        return certain
    K, S = values_KS.shape
    mean, rows, columns = values_KS.mean(), values_KS.mean(axis=1), values_KS.mean(axis=0)
    of_rows, of_columns = rows.var(ddof=1) / K, columns.var(ddof=1) / S
    rest = values_KS - rows[:, None] - columns + mean
    common = (rest**2).sum() / ((K - 1) * (S - 1)) / (K * S)
    variance = max(of_rows + of_columns - common, of_rows, of_columns)
    if variance == 0.0:
        return Interval(float(mean), float(mean), float(mean))
    freedom = max(variance**2 / (of_rows**2 / (K - 1) + of_columns**2 / (S - 1)), S - 1)
    reach = t.ppf((1.0 + LEVEL) / 2, freedom) * np.sqrt(variance)
    return Interval(float(mean), float(max(mean - reach, bounds[0])), float(min(mean + reach, bounds[1])))


def difference(first_KS: np.ndarray, second_KS: np.ndarray) -> Interval:
    """`crossed` of first - second, paired: the same things and seeds in the same cells."""
    if first_KS.shape != second_KS.shape:
        raise ValueError(f"paired scores need the same concepts and seeds, got {first_KS.shape} and {second_KS.shape}")
    return crossed(first_KS - second_KS)


@dataclass(frozen=True)
class Gaussian:
    """The mean and covariance of a set of features."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D)

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Gaussian":
        if len(features_ND) < 2:
            raise ValueError(f"a covariance needs at least two pictures, got {len(features_ND)}")
        return cls(features_ND.mean(axis=0), np.cov(features_ND, rowvar=False).reshape([features_ND.shape[1]] * 2))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two normal distributions (Dowson and Landau, 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), by symmetric eigenvalues, so that singular covariances of few
    samples are fine. From N samples the estimate is too large by about tr(C) / N and a term that falls like D / N:
    compare sets of equal size only, and in few dimensions.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0, None)).sum()
    offset = first.mean - second.mean
    total = offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return float(max(total, 0.0))


def jackknife(sizes: Sequence[int], statistic: Callable[..., float]) -> Interval:
    """A statistic of everything with 1.96 standard errors on either side, from leaving out one row at a time.

    For statistics that repeated rows would bias, as the bootstrap's do to a covariance. `statistic` takes the indices
    that count along each axis of `sizes`; the variances of several axes (things, trainings) add up.
    """
    everything = [np.arange(size) for size in sizes]
    value, variance = statistic(*everything), 0.0
    for axis, size in enumerate(sizes):
        left_out = [
            statistic(*(np.delete(rows, index) if other == axis else rows for other, rows in enumerate(everything)))
            for index in range(size)
        ]
        variance += (size - 1) * np.var(left_out)
    reach = 1.96 * float(np.sqrt(variance))
    return Interval(value, value - reach, value + reach)

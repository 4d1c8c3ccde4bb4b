import numpy as np
import pytest
from scipy.linalg import sqrtm

from dora_mm.eval.statistics import (
    Gaussian,
    Interval,
    bootstrap,
    crossed_interval,
    frechet_distance,
    jackknife,
    paired_difference,
)


def clustered(rng, num_concepts, num_seeds, concept_std):
    """Values around 0: a part that all images of a concept share (concept_std), and noise of each image (1)."""
    return concept_std * rng.normal(size=(num_concepts, 1)) + rng.normal(size=(num_concepts, num_seeds))


@pytest.mark.slow
def test_intervals_over_concepts_cover_the_truth_where_naive_ones_do_not():
    rng = np.random.default_rng(7)
    covered = naive = 0
    for trial in range(400):
        values = clustered(rng, 40, 5, concept_std=1.5)
        interval = bootstrap(values, seed=trial)
        covered += interval.low <= 0 <= interval.high
        naive += abs(values.mean()) <= 1.96 * values.std() / np.sqrt(values.size)
    assert 0.90 <= covered / 400 <= 0.97
    assert naive / 400 < 0.80


@pytest.mark.parametrize(("concept_std", "run_std"), [(0.0, 0.0), (0.0, 0.5), (1.0, 0.2), (1.0, 1.0)])
def test_crossed_intervals_cover_the_truth_however_runs_differ(concept_std, run_std):
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(1000):
        values = clustered(rng, 40, 3, concept_std=concept_std) + run_std * rng.normal(size=(1, 3))
        found = crossed_interval(values)
        missed += not found.low <= 0 <= found.high
    assert missed / 1000 < 0.09


def test_crossed_intervals_of_shares_stay_between_0_and_1():
    values = np.zeros((40, 3))
    values[:, 0] = 1.0
    found = crossed_interval(values, bounds=(0.0, 1.0))
    assert (found.mean, found.low, found.high) == (pytest.approx(1 / 3), 0.0, 1.0)


def test_shares_without_variation_get_the_exact_binomial_bound():
    all_right = crossed_interval(np.ones((40, 3)), bounds=(0.0, 1.0))
    assert all_right.high == 1.0
    # with this true share, 40 successes of 40 have a chance of 2.5 %
    assert all_right.low**40 == pytest.approx(0.025)
    all_wrong = bootstrap(np.zeros((40, 3)))
    assert (all_wrong.low, all_wrong.high) == (0.0, pytest.approx(1 - all_right.low))


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    one = clustered(rng, 40, 3, concept_std=5.0)
    shifted = one + 0.3 + 0.01 * rng.normal(size=one.shape)
    found = paired_difference(shifted, one)
    assert found.low > 0.29
    assert found.high < 0.31
    same = paired_difference(np.ones((40, 3)), np.ones((40, 3)))
    assert same.low == pytest.approx(-same.high)
    assert 0.08 < same.high < 0.10
    with pytest.raises(ValueError, match="same concepts and seeds"):
        paired_difference(one, one[:20])


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(3)
    one, other = (Gaussian.of(rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)) for _ in "ab")
    offset = one.mean - other.mean
    cross = np.real(sqrtm(one.covariance @ other.covariance))
    expected = offset @ offset + np.trace(one.covariance + other.covariance - 2 * cross)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-8)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    rng = np.random.default_rng(4)
    few, shifted = rng.normal(size=(5, 20)), np.eye(20)[0] * 3
    assert frechet_distance(Gaussian.of(few), Gaussian.of(few + shifted)) == pytest.approx(9.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        Gaussian.of(few[:1])


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(5).normal(size=50)
    found = jackknife([50], lambda kept: float(values[kept].mean()))
    error = values.std(ddof=1) / np.sqrt(50)
    mean = values.mean()
    assert found == Interval(
        pytest.approx(mean), pytest.approx(mean - 1.96 * error), pytest.approx(mean + 1.96 * error)
    )


def test_jackknife_over_runs_includes_their_differences():
    values = np.random.default_rng(6).normal(size=(40, 3)) + np.array([-5.0, 0.0, 5.0])
    over_concepts = jackknife([40], lambda concepts: float(values[concepts].mean()))
    over_both = jackknife([40, 3], lambda concepts, runs: float(values[np.ix_(concepts, runs)].mean()))
    error = values.mean(axis=0).std(ddof=1) / np.sqrt(3)
    assert over_both.high - over_both.mean == pytest.approx(1.96 * error, rel=0.02)
    assert over_both.high - over_both.low > 10 * (over_concepts.high - over_concepts.low)

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import binomtest, t, ttest_1samp

from dora_mm.eval.statistics import (
    ConfidenceInterval,
    Gaussian,
    columns,
    frechet_distance,
    groups_needed,
    holm,
    jackknife,
    mean_ci,
    paired_difference,
    paired_p,
    share_ci,
)


def clustered(rng, num_concepts, num_seeds, concept_std):
    """Values around 0: a part that all images of a concept share (concept_std), and noise of each image (1)."""
    return concept_std * rng.normal(size=(num_concepts, 1)) + rng.normal(size=(num_concepts, num_seeds))


def misses(confidence_intervals, truth):
    """The share of intervals that do not contain the truth."""
    return np.mean([not found.low - 1e-12 <= truth <= found.high + 1e-12 for found in confidence_intervals])


@pytest.mark.slow
@pytest.mark.parametrize("num_concepts", [5, 8, 40])
def test_confidence_intervals_over_concepts_cover_the_truth_where_naive_ones_do_not(num_concepts):
    rng = np.random.default_rng(7)
    samples = [clustered(rng, num_concepts, 5, concept_std=1.5) for _ in range(1000)]
    assert 0.035 <= misses([mean_ci(values, over_runs=False) for values in samples], 0.0) <= 0.065
    naive = [abs(values.mean()) > 1.96 * values.std() / np.sqrt(values.size) for values in samples]
    assert np.mean(naive) > 0.20


@pytest.mark.parametrize(("concept_std", "run_std"), [(0.0, 0.0), (0.0, 0.5), (1.0, 0.2), (1.0, 1.0)])
def test_crossed_confidence_intervals_cover_the_truth_however_runs_differ(concept_std, run_std):
    rng = np.random.default_rng(1)
    samples = (clustered(rng, 40, 3, concept_std=concept_std) + run_std * rng.normal(size=(1, 3)) for _ in range(1000))
    assert misses(map(mean_ci, samples), 0.0) < 0.09


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("num_concepts", [5, 8, 24, 40])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_confidence_intervals_of_shares_cover_the_truth(num_concepts, num_seeds, share):
    """Where concepts differ: the percentile bootstrap misses up to 14 % here."""
    rng = np.random.default_rng(3)
    likely = rng.beta(2 * share, 2 * (1 - share), size=(1000, num_concepts, 1))
    samples = (rng.random((1000, num_concepts, num_seeds)) < likely).astype(float)
    assert misses([share_ci(values, over_runs=False) for values in samples], share) <= 0.06


def test_a_share_of_single_values_has_the_exact_binomial_ci():
    for hits, count in ((19, 24), (39, 40), (1, 24), (12, 24)):
        values = (np.arange(count) < hits).astype(float)[:, None]
        exact = binomtest(hits, count).proportion_ci(method="exact")
        found = share_ci(values)
        assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_a_failure_does_not_raise_the_lower_end_of_a_share():
    """That of 40 of 40 was 91.2 %, of 39 of 40 it was 92.5 %."""
    for num_seeds in (1, 3):
        values, lows = np.ones((40, num_seeds)), []
        for failures in range(12):
            lows.append(share_ci(values, over_runs=False).low)
            values[failures, 0] = 0.0
        assert lows == sorted(lows, reverse=True)
        assert lows[0] == pytest.approx(0.025 ** (1 / 40))


def test_concepts_that_are_always_right_or_always_wrong_count_once():
    values = np.repeat((np.arange(24) < 19).astype(float)[:, None], 3, axis=1)
    once, thrice = share_ci(values[:, :1]), share_ci(values, over_runs=False)
    assert (thrice.low, thrice.high) == (pytest.approx(once.low, abs=0.02), pytest.approx(once.high, abs=0.02))


def test_confidence_intervals_of_shares_stay_between_0_and_1():
    values = np.zeros((40, 3))
    values[:, 0] = 1.0
    found = share_ci(values)
    assert found.mean == pytest.approx(1 / 3)
    assert 0.0 <= found.low < 0.01
    assert 0.99 < found.high <= 1.0


def test_shares_without_variation_get_the_exact_binomial_bound():
    all_right = share_ci(np.ones((40, 3)))
    assert all_right.high == 1.0
    # with this true share, 40 successes of 40 have a chance of 2.5 %
    assert all_right.low**40 == pytest.approx(0.025)
    all_wrong = share_ci(np.zeros((40, 3)), over_runs=False)
    assert (all_wrong.low, all_wrong.high) == (0.0, pytest.approx(1 - all_right.low))
    halves = share_ci(np.full((8, 2), 0.6))  # fractions, all alike
    assert halves.low < 0.4
    assert halves.high > 0.8


def test_a_single_concept_has_no_ci():
    for found in (
        mean_ci(np.ones((1, 3))),
        share_ci(np.ones((1, 3)), over_runs=False),
        jackknife([1], lambda kept: 1.0),
    ):
        assert not found.has_ends
        assert found.as_dict() == {"mean": 1.0, "low": None, "high": None}
        assert found.text() == "1.00"
        assert columns(found, "{:.1f}", 100) == {"mean": "100.0", "low": "", "high": ""}
    assert ConfidenceInterval(0.5, 0.4, 0.6).text("{:.0f}", 100) == "50 (40 to 60)"


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


def test_p_values_go_with_the_ci_and_are_those_of_the_t_test():
    values = np.random.default_rng(0).normal(0.4, size=(20, 1))
    found = mean_ci(values)
    assert found.p == pytest.approx(ttest_1samp(values[:, 0], 0).pvalue)
    assert found.excludes_zero == (found.p < 0.05)
    many = (mean_ci(np.random.default_rng(k).normal(0.3, size=(8, 3))) for k in range(200))
    assert all(each.excludes_zero == (each.p < 0.05) for each in many)
    assert mean_ci(np.zeros((5, 1))).p == 1
    assert mean_ci(np.ones((5, 1))).p == pytest.approx(binomtest(5, 5).pvalue)
    assert np.isnan(mean_ci(np.ones((1, 3))).p)


def test_holm_by_hand_and_by_what_it_promises():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the paper's steps
    assert holm([0.9, float("nan"), 0.01])[::2] == pytest.approx([1.0, 0.03])
    assert holm([]) == []
    tests = np.random.default_rng(1).random((2000, 6))
    assert np.mean([min(holm(list(row))) < 0.05 for row in tests]) == pytest.approx(0.05, abs=0.015)


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


def test_jackknife_of_a_mean_is_its_t_ci():
    values = np.random.default_rng(5).normal(size=(8, 2))
    found = jackknife([8], lambda kept: float(values[kept].mean()))
    expected = mean_ci(values, over_runs=False)
    assert (found.mean, found.low, found.high) == (
        pytest.approx(expected.mean),
        pytest.approx(expected.low),
        pytest.approx(expected.high),
    )
    error = values.mean(axis=1).std(ddof=1) / np.sqrt(8)
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, 7) * error)


def test_jackknife_over_runs_includes_their_differences():
    values = np.random.default_rng(6).normal(size=(40, 3)) + np.array([-5.0, 0.0, 5.0])
    over_concepts = jackknife([40], lambda concepts: float(values[concepts].mean()))
    over_both = jackknife([40, 3], lambda concepts, runs: float(values[np.ix_(concepts, runs)].mean()))
    error = values.mean(axis=0).std(ddof=1) / np.sqrt(3)
    assert over_both.high - over_both.mean == pytest.approx(t.ppf(0.975, 2) * error, rel=0.03)
    assert over_both.high - over_both.low > 10 * (over_concepts.high - over_concepts.low)


# --- paired tests and sizes ------------------------------------------------------------------------------------------


def test_single_differences_are_tested_exactly():
    differences = np.array([1.0] * 8 + [-1.0] + [0.0] * 20)[:, None]
    p, exact = paired_p(differences)
    assert exact
    assert p == pytest.approx(2 * (1 + 9) / 2**9)  # at most one of nine is worse, on either side
    assert paired_p(np.zeros((5, 1))) == (1.0, True)


def test_other_differences_are_tested_by_t():
    differences = np.random.default_rng(0).normal(0.3, 1.0, (40, 1))
    p, exact = paired_p(differences)
    assert not exact
    assert p == pytest.approx(ttest_1samp(differences[:, 0], 0.0).pvalue)
    excludes_zero = mean_ci(differences).low > 0 or mean_ci(differences).high < 0
    assert (p < 0.05) == excludes_zero
    assert paired_p(np.array([[0.5]])) == (1.0, False)


def test_as_many_groups_as_a_wished_ci_takes():
    values = np.random.default_rng(1).random((2000, 1))
    needed = groups_needed(values, 0.05)
    assert needed is not None
    widths = [
        (found.high - found.low) / 2
        for found in (mean_ci(np.random.default_rng(seed).random((needed, 1))) for seed in range(50))
    ]
    assert np.mean(widths) == pytest.approx(0.05, rel=0.03)
    assert groups_needed(np.ones((9, 1)), 0.05) is None
    assert groups_needed(values, 0.5) == 4

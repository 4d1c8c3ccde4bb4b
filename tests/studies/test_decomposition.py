"""dM and dD against cases worked by hand and float64, slopes against numpy; and how they go with scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dora_mm.studies.decomposition import (
    WeightPoint,
    pattern,
    rank_correlation,
    relation,
    relation_to_score,
    scored_trainings,
    weight_change,
)


def point(run="a", step=1, matrix="m0", dM=0.0, dD=0.0, score=None):
    return WeightPoint("dora, rank 4", run, step, matrix, dM, dD, score)


def test_longer_rows_change_no_direction_and_turned_ones_no_length():
    W0 = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert weight_change(2 * W0, W0) == (3.5, 0.0)  # lengths 5 and 2
    assert weight_change(W0[:, [1, 0]] * torch.tensor([-1.0, 1.0]), W0) == (0.0, 1.0)
    assert weight_change(-W0, W0) == (0.0, 2.0)


def test_small_angles_are_not_lost_in_single_precision():
    angle = 1e-4
    W = torch.tensor([[math.cos(angle), math.sin(angle)]])
    _, dD = weight_change(W, torch.tensor([[1.0, 0.0]]))
    assert dD == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-3)  # 1 - cos would be 0


def test_rows_of_zeros_have_a_length_and_no_direction():
    W, W0 = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert weight_change(W, W0) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no row with a direction"):
        weight_change(W[:1], W0[:1])
    with pytest.raises(ValueError, match=r"shapes \(2, 2\) and \(1, 2\)"):
        weight_change(W, W0[:1])


@settings(max_examples=20)
@given(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_it_is_the_formula_in_float64(rows, columns, seed):
    stream = torch.Generator().manual_seed(seed)
    W, W0 = torch.randn(2, rows, *columns, generator=stream)
    w, w0 = W.flatten(1).double(), W0.flatten(1).double()
    dM = (w.norm(dim=1) - w0.norm(dim=1)).abs().mean()
    dD = (1 - torch.cosine_similarity(w, w0, dim=1)).mean()
    assert weight_change(W, W0) == pytest.approx((dM.item(), dD.item()), rel=1e-9, abs=1e-12)


def test_slope_and_correlation_are_those_of_all_matrices_and_steps():
    rng = np.random.default_rng(0)
    points = [
        point(run, step, f"m{matrix}", dM=3 * x + 0.1 * rng.normal(), dD=x)
        for run in "ab"
        for step in (1, 2)
        for matrix in range(30)
        for x in [rng.random() + step]
    ]
    found = pattern(points)
    x, y = np.array([(p.dD, p.dM) for p in points]).T
    assert (found.num_runs, found.num_matrices, found.num_points) == (2, 30, 120)
    assert found.slope.mean == pytest.approx(np.polyfit(x, y, 1)[0])
    assert found.correlation.mean == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.slope.low < 3 < found.slope.high
    assert found.slope.high - found.slope.low < 0.5
    last = [p.dM for p in points if p.step == 2]
    assert found.dM.mean == pytest.approx(np.mean(last))


@pytest.mark.slow
def test_confidence_intervals_cover_the_slope_as_often_as_they_say():
    """Points of one matrix share an offset, and those of one training another."""
    covered, rng = 0, np.random.default_rng(1)
    for _ in range(200):
        of_matrix, of_run = rng.normal(size=(20, 2)), 0.1 * rng.normal(size=6)
        points = [
            point(str(run), None, f"m{matrix}", dM=-0.5 * x + 0.3 * of_matrix[matrix, 1] + of_run[run], dD=x)
            for run in range(6)
            for matrix in range(20)
            for x in [of_matrix[matrix, 0] + 0.2 * rng.normal()]
        ]
        slope = pattern(points).slope
        covered += slope.low <= -0.5 <= slope.high
    assert covered >= 180


def test_without_a_line_there_is_no_slope():
    same = pattern([point(matrix=f"m{k}", dM=k, dD=0.0) for k in range(4)])  # magnitude only
    assert same.slope is same.correlation is None
    assert (same.dM.mean, same.dD.mean) == (1.5, 0.0)
    assert pattern([point(dM=1.0, dD=2.0)]).slope is None


def test_scores_go_with_sizes_over_trainings():
    points = [
        point(str(run), None, f"m{matrix}", dM=0.1 * run * matrix, dD=0.01 * matrix, score=0.5 + 0.1 * run)
        for run in range(6)
        for matrix in range(5)
    ]
    trainings = scored_trainings(points)
    assert [each.dM for each in trainings] == pytest.approx([0.2 * run for run in range(6)])
    found = relation_to_score(trainings)
    assert set(found) == {"slope", "dM"}  # dD is the same in all trainings
    assert (found["dM"].pearson.mean, found["slope"].ranks.mean) == pytest.approx((1, 1))
    assert scored_trainings([replace(p, score=None) for p in points]) == []
    assert relation_to_score(trainings[:3]) == {}


def test_a_training_that_fails_decides_pearsons_and_not_that_of_ranks():
    rng = np.random.default_rng(2)
    values, scores = rng.normal(size=(2, 30))
    values[0], scores[0] = 100.0, -20.0
    found = relation(np.append(values, np.nan), np.append(scores, 1.0))
    assert found.pearson.mean < -0.9
    assert abs(found.ranks.mean) < 0.5
    tied = np.stack([np.round(values), scores], axis=1)
    assert rank_correlation(tied) == pytest.approx(spearmanr(tied).statistic)

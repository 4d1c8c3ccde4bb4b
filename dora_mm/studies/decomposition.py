"""How far training moves a weight in length and in direction, and how the two go together (DoRA, section 3, Eq. 1).

A weight W (O, I) has a length and a direction per output row; the paper writes it as (I, O), so its columns are these
rows. Shapes: P points, of M matrices and R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from dora_mm.eval.statistics import ConfidenceInterval, jackknife

_BLOCK = 1 << 18  # entries that are in float64 at a time: larger blocks get new pages from the system each time


def weight_change(W: Tensor, W0: Tensor) -> tuple[float, float]:
    """Returns dM, the mean over rows of | ||w|| - ||w0|| |, and dD, the mean of 1 - cos(w, w0).

    1 - cos is computed as half the squared distance of the unit vectors, which does not cancel. A row of zeros has no
    direction: dD counts the rows that have one in both.

    Args:
        W: The trained weight (O, I), or of a convolution (O, I, *K).
        W0: The base weight, in the same shape.

    Raises:
        ValueError: The shapes differ, or no row of both has a direction.
    """
    if W.shape != W0.shape:
        raise ValueError(f"the weights have the shapes {tuple(W.shape)} and {tuple(W0.shape)}")
    lengths, turns, directed = 0.0, 0.0, 0
    step = max(1, _BLOCK // max(1, W0[0].numel()))
    for one, other in zip(W.flatten(1).split(step), W0.flatten(1).split(step), strict=True):
        w, w0 = one.double(), other.double()
        n, n0 = (torch.linalg.vector_norm(each, dim=1) for each in (w, w0))
        lengths += float((n - n0).abs().sum())
        both = (n > 0) & (n0 > 0)
        units = w[both] / n[both, None] - w0[both] / n0[both, None]
        turns += float(units.square().sum()) / 2
        directed += int(both.sum())
    if not directed:
        raise ValueError("the weights have no row with a direction in both")
    return lengths / len(W), turns / directed


@dataclass(frozen=True)
class WeightPoint:
    """The change of one weight matrix by training, at one checkpoint.

    Attributes:
        method: The method and rank of the training, such as "dora, rank 4".
        run: The run, or the file.
        step: The optimizer steps of the checkpoint; None for an adapter or model without them.
        matrix: The module, such as "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q".
        dM: See `weight_change`.
        dD: See `weight_change`.
        score: The score of the run in its campaign; None where it has none.
    """

    method: str
    run: str
    step: int | None
    matrix: str
    dM: float
    dD: float
    score: float | None = None


@dataclass(frozen=True)
class ChangePattern:
    """How dM and dD of one method go together.

    Attributes:
        num_runs: R.
        num_matrices: M.
        num_points: P.
        slope: Of the line that gives dM from dD by least squares; None where fewer than three points differ.
        correlation: Pearson's, of dM and dD; None likewise.
        dM: The mean at the last step of each run.
        dD: The mean at the last step of each run.
    """

    num_runs: int
    num_matrices: int
    num_points: int
    slope: ConfidenceInterval | None
    correlation: ConfidenceInterval | None
    dM: ConfidenceInterval
    dD: ConfidenceInterval


def pattern(points: Sequence[WeightPoint]) -> ChangePattern:
    """Returns the pattern of points of one method.

    The intervals are 95 % of the jackknife over matrices and, where there are several, over runs: the checkpoints of a
    run are not independent, and stay together. Of a single matrix they are NaN.
    """
    matrices, runs = (np.array([getattr(point, name) for point in points]) for name in ("matrix", "run"))
    values = np.array([(point.dD, point.dM) for point in points])
    final = last_steps(points)
    at_end = np.array([point.step == final[point.run] for point in points])

    def ci(statistic: Callable[[np.ndarray], float], chosen: np.ndarray) -> ConfidenceInterval:
        return over_matrices_and_runs(statistic, values[chosen], matrices[chosen], runs[chosen])

    num_matrices = len(set(matrices))
    related = has_line(values) and num_matrices > 2
    everything = np.ones(len(points), dtype=bool)
    return ChangePattern(
        len(set(runs)),
        num_matrices,
        len(points),
        ci(slope, everything) if related else None,
        ci(correlation, everything) if related else None,
        *(ci(lambda some, column=column: float(some[:, column].mean()), at_end) for column in (1, 0)),
    )


def over_matrices_and_runs(
    statistic: Callable[[np.ndarray], float], values: np.ndarray, matrices: np.ndarray, runs: np.ndarray
) -> ConfidenceInterval:
    """A statistic with the interval of the jackknife over matrices and, where there are several, over runs.

    Args:
        statistic: A function of rows of `values`.
        values: (P,) or (P, K).
        matrices: The matrix of each point, (P,).
        runs: The run of each point, (P,).

    Returns:
        The interval; without ends where there is a single matrix.
    """
    names = [np.unique(matrices), np.unique(runs)]
    if len(names[0]) < 2:
        return ConfidenceInterval(float(statistic(values)))
    axes = list(zip((matrices, runs), names, strict=True))[: 2 if len(names[1]) > 1 else 1]

    def of_some(*kept: np.ndarray) -> float:
        chosen = np.ones(len(values), dtype=bool)
        for (labels, every), indices in zip(axes, kept, strict=True):
            chosen &= np.isin(labels, every[indices])
        return float(statistic(values[chosen]))

    return jackknife([len(every) for _, every in axes], of_some)


def last_steps(points: Sequence[WeightPoint]) -> dict[str, int | None]:
    """The last step of each run."""
    found: dict[str, int | None] = {}
    for point in points:
        before = found.setdefault(point.run, point.step)
        if point.step is not None and before is not None:
            found[point.run] = max(before, point.step)
    return found


def has_line(values_P2: np.ndarray) -> bool:
    """Whether three or more points differ in both columns, so that a line has a slope and a correlation."""
    return len(values_P2) > 2 and bool((np.ptp(values_P2, axis=0) > 0).all())


def slope(values_P2: np.ndarray) -> float:
    """The slope of the least-squares line of the second column over the first; NaN without a line."""
    if not has_line(values_P2):
        return float("nan")
    x, y = (values_P2 - values_P2.mean(axis=0)).T
    return float(x @ y / (x @ x))


def correlation(values_P2: np.ndarray) -> float:
    """Pearson's correlation of the two columns; NaN without a line."""
    if not has_line(values_P2):
        return float("nan")
    x, y = (values_P2 - values_P2.mean(axis=0)).T
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def rank_correlation(values_P2: np.ndarray) -> float:
    """Spearman's correlation of the two columns: that of their ranks, which a few far points do not decide."""
    return correlation(rankdata(values_P2, axis=0))


class ScoredTraining(NamedTuple):
    """A training's weight changes and score: slope of dM over dD, means of both at the last step."""

    method: str
    run: str
    slope: float  # NaN without a line
    dM: float
    dD: float
    score: float


def scored_trainings(points: Sequence[WeightPoint]) -> list[ScoredTraining]:
    """The trainings that have a score, in the order of their names."""
    final, found = last_steps(points), []
    for run in sorted({point.run for point in points if point.score is not None}):
        own = [point for point in points if point.run == run]
        values = np.array([(point.dD, point.dM) for point in own])
        dD, dM = values[[point.step == final[run] for point in own]].mean(axis=0)
        found.append(ScoredTraining(own[0].method, run, slope(values), float(dM), float(dD), float(own[0].score or 0)))
    return found


class Relation(NamedTuple):
    """Correlations of something with the scores of trainings, with 95 % intervals of the jackknife over these."""

    ranks: ConfidenceInterval  # Spearman's: of all that goes up or down together
    pearson: ConfidenceInterval  # of what lies on a line, which a few trainings that failed can decide


def relation_to_score(trainings: Sequence[ScoredTraining]) -> dict[str, Relation]:
    """How slope, dM and dD of trainings go with their scores, by these names.

    Empty where fewer than four have different scores.
    """
    scores = np.array([each.score for each in trainings])
    found = {
        name: relation(np.array([getattr(each, name) for each in trainings]), scores) for name in ("slope", "dM", "dD")
    }
    return {name: each for name, each in found.items() if each is not None}


def relation(values: np.ndarray, scores: np.ndarray) -> Relation | None:
    """How values of trainings go with their scores, without those that are NaN; None: fewer than four are left."""
    pairs = np.stack([values, scores], axis=-1)[np.isfinite(values)]
    if len(pairs) < 4 or not has_line(pairs):
        return None
    return Relation(
        *(jackknife([len(pairs)], lambda kept, of=of: of(pairs[kept])) for of in (rank_correlation, correlation))
    )

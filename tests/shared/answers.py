"""Scores of random answers."""

import numpy as np

from dora_mm.eval.vl.confidence_intervals import AnswerScores


def random_scores(groups: int, runs: int = 3, seed: int = 0, share: float = 0.6, size: int = 7, prefix: str = ""):
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(groups), rng.integers(1, size, groups))
    probabilities = share + rng.uniform(-0.2, 0.2, groups)[names]
    values = (rng.random((len(names), runs)) < probabilities[:, None]).astype(float)
    return AnswerScores(values, tuple(f"{prefix}{name}" for name in names))

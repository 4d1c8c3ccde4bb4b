"""Scores of edits: how near results come to their targets, and what of the reference they keep.

Shapes: K pairs, S seeds, D dimensions of unit vectors, H x W pixels.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from dora_mm.eval.statistics import ConfidenceInterval, jackknife
from dora_mm.utils.tables import markdown_table

LIKENESS, NEARER, CHANGED = "likeness", "nearer", "changed"
HEADINGS = {
    LIKENESS: "likeness to the target",
    NEARER: "nearer to it than the reference",
    CHANGED: "change of what should stay",
}
DIGITS = "{:.3f}"
FEWEST = 0.01  # share of an image below which what should stay is too little to be scored

PairScores = Mapping[str, np.ndarray]  # by name, (K, S) each


def vector_scores(results_KSD: np.ndarray, targets_KD: np.ndarray, references_KD: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by the vectors of an image encoder, (K, S) each.

    LIKENESS is the cosine of result and target. NEARER is 1 - |result - target| / |reference - target|: 0 for a copy of
    the reference and 1 for the target, negative where a result is farther from the target than its reference is; NaN
    where these two are one image.

    Args:
        results_KSD: The results.
        targets_KD: Their targets.
        references_KD: The first reference of each.
    """
    likeness = np.einsum("ksd,kd->ks", results_KSD, targets_KD)
    distances = np.linalg.norm(results_KSD - targets_KD[:, None], axis=2)
    wanted = np.linalg.norm(references_KD - targets_KD, axis=1)[:, None]
    nearer = 1 - np.divide(distances, wanted, out=np.full_like(distances, np.nan), where=wanted > 1e-6)
    return {LIKENESS: likeness, NEARER: nearer}


def kept_pixels(target_HWC: np.ndarray, reference_HWC: np.ndarray, threshold: float) -> np.ndarray:
    """Where a target is as its reference: no channel, from 0 to 1, differs by `threshold` or more; (H, W), boolean."""
    return np.abs(target_HWC - reference_HWC).max(axis=2) < threshold


def changed_pixels(result_HWC: np.ndarray, reference_HWC: np.ndarray, kept_HW: np.ndarray) -> float:
    """The mean difference of result and reference, from 0 to 1, where the reference should stay.

    NaN where that is less than a hundredth of the image.
    """
    if kept_HW.mean() < FEWEST:
        return float("nan")
    return float(np.abs(result_HWC - reference_HWC)[kept_HW].mean())


def confidence_intervals(scores: PairScores) -> dict[str, ConfidenceInterval]:
    """The means of all scores over pairs, with 95 % intervals; pairs for which one has no value are left out of it."""
    found = {name: values[~np.isnan(values).any(axis=1)] for name, values in scores.items()}
    return {name: jackknife([len(values)], partial(_mean, values)) for name, values in found.items() if len(values)}


def _mean(values_KS: np.ndarray, pairs: np.ndarray) -> float:
    return float(values_KS[pairs].mean())


def differences(first: PairScores, second: PairScores) -> dict[str, ConfidenceInterval]:
    """The differences of the scores of the same pairs and seeds, with 95 % intervals over pairs."""
    return confidence_intervals({name: values - second[name] for name, values in first.items() if name in second})


def conclusion(
    nearer: ConfidenceInterval | None,
    gained: ConfidenceInterval | None,
    by_reference: ConfidenceInterval | None,
) -> str:
    """The conclusion from the scores, in sentences.

    Args:
        nearer: How much nearer to the targets the results of the adapter are than their references.
        gained: The same, less that of the bare model.
        by_reference: The same, less that of the adapter without references; None: the model takes no text alone.
    """
    if nearer is None:
        return "All targets are their references: there is no edit to score."
    amount = f"{nearer.mean:+.3f} ({nearer.low:+.3f} to {nearer.high:+.3f})"
    if nearer.low <= 0:
        worse = "are farther from" if nearer.high < 0 else "are not shown to be nearer to"
        return (
            f"The results {worse} the targets than copies of the references ({amount}): train longer, or on more pairs."
        )
    sentences = [f"The results are nearer to the targets than the references are ({amount})."]
    if gained is not None and gained.low <= 0:
        sentences.append("The bare model is not shown to do worse.")
    if by_reference is not None and by_reference.low <= 0:
        sentences.append("Nothing shows that the references are used: the prompt alone does as well.")
    return " ".join(sentences)


def edit_table(rows: Mapping[str, Mapping[str, ConfidenceInterval]]) -> str:
    """A Markdown table with a row per name and a column per score; "-" where a row has none."""
    body = [[name, *(row[key].text(DIGITS) if key in row else "-" for key in HEADINGS)] for name, row in rows.items()]
    return markdown_table(["", *HEADINGS.values()], body)

"""Scores of a slider, from vectors of images: what moves with the strength, what stays, and how linear it is.

Shapes: T strengths, K prompts, S seeds, D dimensions of unit vectors.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.utils.tables import markdown_table

ATTRIBUTE, LIKENESS = "attribute", "likeness to the neutral image"
LINEARITY, SLOPE = "correlation of strength and attribute", "attribute per strength"


def attributes(images_TKSD: np.ndarray, plus_KSD: np.ndarray, minus_KSD: np.ndarray) -> np.ndarray:
    """How much of the attribute images show: 1 as images of the plus caption on average, -1 as those of the minus one.

    The axis leads from the mean of the minus images to that of the plus images. That of a prompt is made of the images
    of all other prompts, so that no image is measured along what is particular to its own thing.

    Args:
        images_TKSD: The images that are scored.
        plus_KSD: Those of the plus caption, of the same prompts.
        minus_KSD: Those of the minus caption.

    Returns:
        The scores (T, K, S).
    """
    scores = np.empty(images_TKSD.shape[:3])
    for prompt in range(images_TKSD.shape[1]):
        others = np.delete(np.arange(len(plus_KSD)), prompt) if len(plus_KSD) > 1 else [0]
        plus, minus = (side[others].mean(axis=(0, 1)) for side in (plus_KSD, minus_KSD))
        scores[:, prompt] = along(images_TKSD[:, prompt], plus, minus)
    return scores


def along(vectors: np.ndarray, plus_D: np.ndarray, minus_D: np.ndarray) -> np.ndarray:
    """The positions of vectors (..., D) on the line through two points: 1 at plus, -1 at minus."""
    axis = plus_D - minus_D
    return 2 * (vectors - (plus_D + minus_D) / 2) @ axis / (axis @ axis)


def correlations(strengths_T: np.ndarray, scores_TKS: np.ndarray) -> np.ndarray:
    """Pearson's correlation of strength and score for each prompt and seed, (K, S); 0 where the score never changes."""
    x, y = (values - values.mean(axis=0) for values in (strengths_T, scores_TKS))
    norms = np.sqrt((x @ x) * (y**2).sum(axis=0))
    return np.divide(np.tensordot(x, y, 1), norms, out=np.zeros_like(norms), where=norms > 0)


def slopes(strengths_T: np.ndarray, scores_TKS: np.ndarray) -> np.ndarray:
    """The slope of the least-squares line through the scores of each prompt and seed, (K, S)."""
    x = strengths_T - strengths_T.mean()
    return np.tensordot(x, scores_TKS, 1) / (x @ x)


def score_slider(
    strengths: Sequence[float], images_TKSD: np.ndarray, neutral_KSD: np.ndarray, axis: tuple[np.ndarray, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, ConfidenceInterval]]:
    """All scores of the images of an adapter.

    Args:
        strengths: The T strengths.
        images_TKSD: The images at these.
        neutral_KSD: The base model's images of the same prompts and seeds.
        axis: The images of the plus and of the minus caption, see `attributes`.

    Returns:
        The scores of each image by name, (T, K, S); and the slope and correlation with 95 % intervals over prompts.
    """
    scores = attributes(images_TKSD, *axis)
    likeness, x = (images_TKSD * neutral_KSD).sum(axis=-1), np.asarray(strengths, dtype=float)
    interval = partial(mean_ci, over_runs=False)
    summary = {SLOPE: interval(slopes(x, scores)), LINEARITY: interval(correlations(x, scores), bounds=(-1.0, 1.0))}
    return {ATTRIBUTE: scores, LIKENESS: likeness}, summary


def slider_table(strengths: Sequence[float], cells: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """A Markdown table with a row per strength, and the scores of each adapter, with 95 % intervals over prompts.

    Args:
        strengths: The strengths.
        cells: The scores (T, K, S) of each image by name, by the name of the adapter.
    """
    names = [f"{score}, {adapter}" for adapter, scores in cells.items() for score in scores]
    rows = [
        [
            f"{strength:g}",
            *(mean_ci(s[row], over_runs=False).text("{:.3f}") for scores in cells.values() for s in scores.values()),
        ]
        for row, strength in enumerate(strengths)
    ]
    return markdown_table(["strength", *names], rows)


def conclusion(own: Mapping[str, ConfidenceInterval], control: Mapping[str, ConfidenceInterval] | None) -> str:
    """The conclusion from slope and correlation, with advice, in sentences.

    Args:
        own: Those of the slider.
        control: Those of the random adapter; None: it was not generated.
    """
    slope, linear = own[SLOPE], own[LINEARITY]
    amount = f"{slope.text('{:+.3f}')} per strength, correlation {linear.text()}"
    if not slope.low > 0:
        return f"No movement along the attribute can be told from none ({amount}): raise slider.eta, or train longer."
    if control is not None and slope.low <= control[SLOPE].high:
        theirs = control[SLOPE].text("{:+.3f}")
        return f"The slider moves the attribute ({amount}), but a random adapter of equal norm may as well ({theirs})."
    more = " more than a random adapter of equal norm" if control else ""
    return f"The slider moves the attribute{more}: {amount}. Look at the grid for what else moves."

"""Scores of a style that no judge knows, from vectors of images: likeness to the training images, variety, drift.

Shapes: N images, M training images, D dimensions of unit vectors, K prompts, S seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan

import numpy as np
from PIL import Image

from dora_mm.eval.images.concepts import unit_rows
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.statistics import ConfidenceInterval, jackknife
from dora_mm.utils.tables import markdown_table

LIKENESS, NEAREST, VARIETY, TEXT, DRIFT = "likeness", "nearest", "variety", "prompt", "drift"
HEADINGS = {
    LIKENESS: "likeness to the training images",
    NEAREST: "the nearest of them",
    VARIETY: "variety",
    TEXT: "likeness to the prompt",
    DRIFT: "drift from the bare model",
}
DIGITS = "{:.3f}"  # cosines of images are close to each other


def embedded_vectors(encoder: Encoder, images: Sequence[Image.Image]) -> np.ndarray:
    """Unit vectors of images by the embedded encoder, (N, D): half texture, half content."""
    features = encoder(images)
    return unit_rows(np.concatenate([unit_rows(features.texture), unit_rows(features.content)], axis=1))


@dataclass(frozen=True)
class StyleScores:
    """Scores of images, some of which compare the images with each other.

    Attributes:
        single: Scores of each image alone by name, (N,) each.
        pairwise: Scores by name that follow from the cosines of images with each other (N, N): (N,) each.
        cosines_NN: These cosines.
        num_seeds: Images of each prompt, which follow each other.
    """

    single: Mapping[str, np.ndarray]
    pairwise: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    cosines_NN: np.ndarray
    num_seeds: int

    @property
    def num_prompts(self) -> int:
        """K."""
        return len(self.cosines_NN) // self.num_seeds

    @property
    def cells(self) -> dict[str, np.ndarray]:
        """All scores of each image by name, (N,) each."""
        return {**self.single, **{name: score(self.cosines_NN) for name, score in self.pairwise.items()}}

    def mean(self, name: str, prompts: np.ndarray) -> float:
        """The mean of a score over the images of some prompts, which are compared with each other alone.

        NaN where it compares images and there is one.
        """
        rows = (prompts[:, None] * self.num_seeds + np.arange(self.num_seeds)).ravel()
        if name in self.single:
            return float(self.single[name][rows].mean())
        if len(rows) < 2:
            return nan
        return float(self.pairwise[name](self.cosines_NN[np.ix_(rows, rows)]).mean())


def with_others(cosines_NN: np.ndarray) -> np.ndarray:
    """The mean cosine of each image with the others, (N,)."""
    return (cosines_NN.sum(axis=1) - cosines_NN.diagonal()) / (len(cosines_NN) - 1)


def variety(cosines_NN: np.ndarray) -> np.ndarray:
    """1 minus the mean cosine of each image with the others, (N,): 0 where all images are one."""
    return 1 - with_others(cosines_NN)


def nearest_other(cosines_NN: np.ndarray) -> np.ndarray:
    """The cosine of each image with the nearest other one, (N,)."""
    return (cosines_NN - 3 * np.eye(len(cosines_NN))).max(axis=1)


def scores_of(
    generated_ND: np.ndarray,
    training_MD: np.ndarray,
    num_seeds: int,
    texts_ND: np.ndarray | None = None,
    bare_ND: np.ndarray | None = None,
) -> StyleScores:
    """All scores of generated images.

    Args:
        generated_ND: The images.
        training_MD: The training images.
        num_seeds: Images of each prompt, which follow each other.
        texts_ND: The prompt of each; None: the encoder reads none.
        bare_ND: The bare model's image for each; None: these are the bare model's.
    """
    cosines_NM = generated_ND @ training_MD.T
    single = {LIKENESS: cosines_NM.mean(axis=1), NEAREST: cosines_NM.max(axis=1)}
    if texts_ND is not None:
        single[TEXT] = (generated_ND * texts_ND).sum(axis=1)
    if bare_ND is not None:
        single[DRIFT] = 1 - (generated_ND * bare_ND).sum(axis=1)
    pairwise = {VARIETY: variety} if len(generated_ND) > 1 else {}
    return StyleScores(single, pairwise, generated_ND @ generated_ND.T, num_seeds)


def among_themselves(training_MD: np.ndarray) -> StyleScores:
    """The scores of the training images, each compared with the others; none of a single one."""
    pairwise = {LIKENESS: with_others, NEAREST: nearest_other, VARIETY: variety} if len(training_MD) > 1 else {}
    return StyleScores({}, pairwise, training_MD @ training_MD.T, num_seeds=1)


def confidence_intervals(scores: StyleScores) -> dict[str, ConfidenceInterval]:
    """The means of all scores, with 95 % intervals over prompts: see `jackknife`."""
    names = [*scores.single, *scores.pairwise]
    return {name: jackknife([scores.num_prompts], partial(scores.mean, name)) for name in names}


def differences(first: StyleScores, second: StyleScores) -> dict[str, ConfidenceInterval]:
    """The differences of the scores that both have, of the same prompts and seeds, with 95 % intervals over prompts."""

    def difference(name: str, prompts: np.ndarray) -> float:
        return first.mean(name, prompts) - second.mean(name, prompts)

    others = {*second.single, *second.pairwise}
    shared = [name for name in (*first.single, *first.pairwise) if name in others]
    return {name: jackknife([first.num_prompts], partial(difference, name)) for name in shared}


def conclusion(
    styled: Mapping[str, ConfidenceInterval],
    style_free: Mapping[str, ConfidenceInterval],
    nearest: ConfidenceInterval,
    nearest_of_training: ConfidenceInterval,
    trigger: str | None,
    num_prompts: int,
) -> str:
    """The conclusion from the scores, with advice, in sentences.

    Args:
        styled: The adapter's scores minus the bare model's, of prompts in the style.
        style_free: Those of prompts that do not ask for it.
        nearest: The adapter's likeness to the nearest training image, of prompts in the style.
        nearest_of_training: That of the training images with each other.
        trigger: The word for the style that every caption has; None: there is none.
        num_prompts: The number of prompts in the style.
    """
    gained, leaked = styled[LIKENESS], style_free[LIKENESS]
    amount = f"{gained.mean:+.3f} ({gained.low:+.3f} to {gained.high:+.3f}) likeness"
    if gained.high < 0:
        return f"The adapter leads away from the training images ({amount}): try a lower rate, or fewer steps."
    if gained.low <= 0:
        return (
            f"With {num_prompts} prompts in the style, the adapter is not distinguishable from the bare model "
            f"({amount}): score more prompts, or train longer."
        )
    sentences = [f"The adapter generates closer to the training images than the bare model ({amount})."]
    if nearest.low > nearest_of_training.high:
        sentences.append("It copies single ones: take an earlier checkpoint, or more images.")
    if leaked.low > 0 and leaked.mean > gained.mean / 2:
        without = (
            f"although every caption has {trigger}: set preserve" if trigger else "too: put a word for it into captions"
        )
        sentences.append(f"The style shows without being asked, {without}, or lower the strength.")
    return " ".join(sentences) if sentences[1:] else f"{sentences[0]} Look at the images, and keep it."


def own_style_table(rows: Mapping[str, Mapping[str, ConfidenceInterval]]) -> str:
    """A Markdown table with a row per name and a column per score; "-" where a row has none."""
    shown = [name for name in HEADINGS if any(name in row for row in rows.values())]
    body = [[name, *(row[key].text(DIGITS) if key in row else "-" for key in shown)] for name, row in rows.items()]
    return markdown_table(["", *(HEADINGS[key] for key in shown)], body)

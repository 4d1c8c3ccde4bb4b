"""Scores of a style that no judge knows, from vectors of pictures: likeness to the training pictures, variety, drift.

Shapes: N pictures, M training pictures, D dimensions of unit vectors, K prompts, S seeds.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dora_mm.eval.images.concepts import unit_rows
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.statistics import Interval, bootstrap
from dora_mm.utils.tables import markdown_table

LIKENESS, NEAREST, VARIETY, TEXT, DRIFT = "likeness", "nearest", "variety", "prompt", "drift"
HEADINGS = {
    LIKENESS: "likeness to the training pictures",
    NEAREST: "the nearest of them",
    VARIETY: "variety",
    TEXT: "likeness to the prompt",
    DRIFT: "drift from the bare model",
}


def embedded_vectors(encoder: Encoder, images: Sequence[Image.Image]) -> np.ndarray:
    """Unit vectors of pictures by the embedded encoder, (N, D): half texture, half content."""
    features = encoder(images)
    return unit_rows(np.concatenate([unit_rows(features.texture), unit_rows(features.content)], axis=1))


def likeness(drawn_ND: np.ndarray, training_MD: np.ndarray) -> dict[str, np.ndarray]:
    """The mean cosine of each picture with the training pictures, and that with the nearest one, (N,) each."""
    cosines_NM = drawn_ND @ training_MD.T
    return {LIKENESS: cosines_NM.mean(axis=1), NEAREST: cosines_NM.max(axis=1)}


def variety(drawn_ND: np.ndarray) -> np.ndarray:
    """1 minus the mean cosine of each picture with the others, (N,): 0 where all pictures are one."""
    others = max(len(drawn_ND) - 1, 1)
    return 1 - ((drawn_ND @ drawn_ND.T).sum(axis=1) - 1) / others


def drift(drawn_ND: np.ndarray, bare_ND: np.ndarray) -> np.ndarray:
    """1 minus the cosine of each picture with the bare model's of the same prompt and seed, (N,)."""
    return 1 - (drawn_ND * bare_ND).sum(axis=1)


def among_themselves(training_MD: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of the training pictures, each compared with the others, (M,) each."""
    cosines_MM = training_MD @ training_MD.T
    others = max(len(training_MD) - 1, 1)
    nearest_M = (cosines_MM - 3 * np.eye(len(training_MD))).max(axis=1)
    return {
        LIKENESS: (cosines_MM.sum(axis=1) - 1) / others,
        NEAREST: nearest_M,
        VARIETY: variety(training_MD),
    }


def scores_of(
    drawn_ND: np.ndarray,
    training_MD: np.ndarray,
    texts_ND: np.ndarray | None = None,
    bare_ND: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """All scores of pictures by name, (N,) each.

    Args:
        drawn_ND: The pictures.
        training_MD: The training pictures.
        texts_ND: The prompt of each; None: the encoder reads none.
        bare_ND: The bare model's picture for each; None: these are the bare model's.
    """
    found = likeness(drawn_ND, training_MD) | {VARIETY: variety(drawn_ND)}
    if texts_ND is not None:
        found[TEXT] = (drawn_ND * texts_ND).sum(axis=1)
    if bare_ND is not None:
        found[DRIFT] = drift(drawn_ND, bare_ND)
    return found


def intervals(cells: Mapping[str, np.ndarray], num_seeds: int) -> dict[str, Interval]:
    """The means of scores of K * S pictures, with 95 % intervals over prompts."""
    return {name: bootstrap(values.reshape(-1, num_seeds)) for name, values in cells.items()}


def differences(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], num_seeds: int
) -> dict[str, Interval]:
    """The mean paired differences of the scores that both have, with 95 % intervals over prompts."""
    shared = [name for name in first if name in second]
    found = {name: (first[name] - second[name]).reshape(-1, num_seeds) for name in shared}
    return {name: bootstrap(values) for name, values in found.items()}


def conclusion(
    styled: Mapping[str, Interval],
    plain: Mapping[str, Interval],
    nearest: Interval,
    nearest_of_training: Interval,
) -> str:
    """What the scores mean and what to do about it, in sentences.

    Args:
        styled: The adapter's scores minus the bare model's, of prompts in the style.
        plain: Those of prompts that do not ask for it.
        nearest: The adapter's likeness to the nearest training picture, of prompts in the style.
        nearest_of_training: That of the training pictures with each other.
    """
    gained, leaked = styled[LIKENESS], plain[LIKENESS]
    amount = f"{gained.mean:+.3f} ({gained.low:+.3f} to {gained.high:+.3f}) likeness"
    if gained.high < 0:
        return f"The adapter leads away from the training pictures ({amount}): try a lower rate, or fewer steps."
    if gained.low <= 0:
        return f"These pictures show no style of the adapter ({amount}): train longer, or score more prompts and seeds."
    said = [f"The adapter draws closer to the training pictures than the bare model ({amount})."]
    if nearest.low > nearest_of_training.high:
        said.append("It copies single ones: take an earlier checkpoint, or more pictures.")
    if leaked.low > 0 and leaked.mean > gained.mean / 2:
        said.append("It does so without being asked, too: put a word for the style into captions, or lower strength.")
    return " ".join(said) if said[1:] else f"{said[0]} Look at the pictures, and keep it."


def own_style_table(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """A Markdown table with a row per name and a column per score; "-" where a row has none."""
    shown = [name for name in HEADINGS if any(name in row for row in rows.values())]
    body = [[name, *(_shown(row[key]) if key in row else "-" for key in shown)] for name, row in rows.items()]
    return markdown_table(["", *(HEADINGS[key] for key in shown)], body)


def _shown(interval: Interval) -> str:
    """Three digits: cosines of pictures are close to each other."""
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"

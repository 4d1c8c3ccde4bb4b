"""The style of an image: a linear classifier on texture statistics, and a distance to a set of real images.

Shapes: N images, T texture statistics, C classes, D principal components.
"""

from dataclasses import dataclass

import numpy as np

from dora_mm.eval.statistics import Gaussian, frechet_distance

# One class per row. Noto icons have some shading, but the base model is trained on them as a flat style. An image that
# looks like them must not count as the result of a style adapter, so Noto belongs to the flat class.
CLASSES: dict[str, tuple[str, ...]] = {
    "flat": ("flat", "twemoji", "noto", "contrast"),
    "3d": ("3d",),
    "brick": ("brick",),
}
STYLES = tuple(style for styles in CLASSES.values() for style in styles)


@dataclass(frozen=True)
class StyleClassifier:
    """Multinomial logistic regression on standardised features."""

    mean: np.ndarray  # (T,)
    scale: np.ndarray  # (T,)
    weight: np.ndarray  # (C, T)
    bias: np.ndarray  # (C,)

    def standardize(self, texture_NT: np.ndarray) -> np.ndarray:
        """Returns (texture - mean) / scale, (N, T)."""
        return (texture_NT - self.mean) / self.scale

    def log_probabilities(self, texture_NT: np.ndarray) -> np.ndarray:
        """Returns log-probabilities (N, C), classes in the order of CLASSES."""
        logits_NC = self.standardize(texture_NT) @ self.weight.T + self.bias
        return logits_NC - log_sum_exp(logits_NC)


def log_odds(log_probabilities_NC: np.ndarray, name: str) -> np.ndarray:
    """Returns log(p / (1 - p)) of one class, (N,), without the rounding error of 1 - p."""
    index = list(CLASSES).index(name)
    others = np.delete(log_probabilities_NC, index, axis=-1)
    return log_probabilities_NC[..., index] - log_sum_exp(others)[..., 0]


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Returns log(sum(exp(x))) over the last axis, which is kept with length 1."""
    top = x.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class StyleSpace:
    """Principal components of the standardised texture statistics, and the real images of every class in them."""

    components: np.ndarray  # (T, D)
    real: dict[str, Gaussian]  # by class

    def project(self, standardized_NT: np.ndarray) -> np.ndarray:
        """Returns coordinates (N, D)."""
        return standardized_NT @ self.components

    def distance(self, projected_ND: np.ndarray, name: str) -> float:
        """Returns the squared Frechet distance to the real images of a class; see `frechet_distance` about its bias."""
        return frechet_distance(Gaussian.of(projected_ND), self.real[name])

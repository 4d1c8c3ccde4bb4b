"""Fits the judge's style classifier and style space on real images.

Shapes: N images, T texture statistics, C classes, D principal components.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dora_mm.eval.images.style import CLASSES, STYLES, StyleClassifier, StyleSpace
from dora_mm.eval.statistics import Gaussian

NUM_FOLDS = 5
INVERSE_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # C of scikit-learn
NUM_COMPONENTS = 32
CLASS_FLAT, CLASS_3D = (list(CLASSES).index(name) for name in ("flat", "3d"))


def class_of(style: str) -> str:
    """The class that contains an icon style."""
    return next(name for name, styles in CLASSES.items() if style in styles)


def fit_styles(
    texture: Mapping[str, np.ndarray], codes: Mapping[str, Sequence[str]], deciding: slice = slice(None)
) -> tuple[StyleClassifier, StyleSpace, dict[str, np.ndarray]]:
    """Fits the style classifier and the style space.

    All classes have the same weight, and so have the styles within a class. The penalty is the strongest whose
    cross-validated log loss is within one standard error of the best: the images classified later are generated and
    differ from the real ones, and a more strongly regularised classifier is less sensitive to that.

    The boundary between flat and 3D is then shifted so that, among the rows `deciding`, as many Fluent flat icons are
    taken for 3D as 3D icons for flat. Without the shift it depends on twemoji and high contrast, which are never taken
    for 3D, and a fifth of the Fluent flat icons are on the wrong side once they have the UNet's artifacts.

    Args:
        texture: Style -> texture statistics of real images, (N, T).
        codes: Style -> the concept code of each row.
        deciding: The rows of each style that determine the shift.

    Returns:
        The classifier, the style space, and for every style the predicted class index of each row, by classifiers that
        were trained without its concept (a concept is in one fold only).
    """
    from sklearn.model_selection import GroupKFold

    x_NT = np.concatenate([texture[style] for style in STYLES]).astype(np.float64)
    y_N = np.concatenate([np.full(len(texture[s]), list(CLASSES).index(class_of(s))) for s in STYLES])
    groups_N = np.concatenate([np.asarray(codes[style]) for style in STYLES])
    weights_N = np.concatenate(
        [np.full(len(texture[s]), 1.0 / (len(CLASSES[class_of(s)]) * len(texture[s]))) for s in STYLES]
    )
    weights_N *= len(weights_N) / weights_N.sum()
    folds = list(GroupKFold(NUM_FOLDS, shuffle=True, random_state=0).split(x_NT, y_N, groups_N))
    penalty, unseen_NC = _cross_validate(x_NT, y_N, weights_N, folds)
    classifier = _fit(x_NT, y_N, weights_N, penalty)
    ends = np.cumsum([len(texture[style]) for style in STYLES])
    unseen = dict(zip(STYLES, np.split(unseen_NC, ends[:-1]), strict=True))
    shift_C = np.zeros(len(CLASSES))
    shift_C[CLASS_3D] = -equal_errors(*(_margin(unseen[style][deciding]) for style in ("flat", "3d")))
    classifier = replace(classifier, bias=classifier.bias + shift_C)
    predicted = {style: (unseen_NC + shift_C).argmax(axis=1) for style, unseen_NC in unseen.items()}
    return classifier, _fit_space(classifier.standardize(x_NT), y_N, weights_N), predicted


def _margin(log_probabilities_NC: np.ndarray) -> np.ndarray:
    return log_probabilities_NC[:, CLASS_3D] - log_probabilities_NC[:, CLASS_FLAT]


def equal_errors(low: np.ndarray, high: np.ndarray) -> float:
    """The threshold with equal error rates: the share of `low` above it equals the share of `high` below it.

    Args:
        low: Scores of the class that should be below the threshold, (N,).
        high: Scores of the class that should be above it, (M,).
    """
    found = np.sort(np.concatenate([low, high]))
    between = (found[1:] + found[:-1]) / 2
    too_high = (low[None] > between[:, None]).mean(axis=1)
    too_low = (high[None] < between[:, None]).mean(axis=1)
    return float(between[np.abs(too_high - too_low).argmin()])


def _cross_validate(x_NT, y_N, weights_N, folds) -> tuple[float, np.ndarray]:
    """The chosen inverse penalty, and the log probabilities (N, C) of each row while its fold is held out."""
    losses, outputs = np.empty((len(INVERSE_PENALTIES), len(folds))), []
    for row, penalty in enumerate(INVERSE_PENALTIES):
        unseen_NC = np.empty((len(x_NT), len(CLASSES)))
        for column, (kept, held_out) in enumerate(folds):
            model = _fit(x_NT[kept], y_N[kept], weights_N[kept], penalty)
            unseen_NC[held_out] = model.log_probabilities(x_NT[held_out])
            surprise = -unseen_NC[held_out, y_N[held_out]]
            losses[row, column] = np.average(surprise, weights=weights_N[held_out])
        outputs.append(unseen_NC)
    means = losses.mean(axis=1)
    best = means.argmin()
    limit = means[best] + losses[best].std(ddof=1) / np.sqrt(len(folds))
    chosen = int(np.flatnonzero(means <= limit)[0])
    return INVERSE_PENALTIES[chosen], outputs[chosen]


def _fit(x_NT, y_N, weights_N, penalty: float) -> StyleClassifier:
    from sklearn.linear_model import LogisticRegression

    mean_T = np.average(x_NT, axis=0, weights=weights_N)
    scale_T = np.sqrt(np.average((x_NT - mean_T) ** 2, axis=0, weights=weights_N))
    scale_T[scale_T < 1e-6] = 1.0  # a constant channel
    model = LogisticRegression(C=penalty, max_iter=2000).fit((x_NT - mean_T) / scale_T, y_N, sample_weight=weights_N)
    return StyleClassifier(mean_T, scale_T, model.coef_, model.intercept_)


def _fit_space(z_NT: np.ndarray, y_N: np.ndarray, weights_N: np.ndarray) -> StyleSpace:
    _, _, axes = np.linalg.svd(z_NT * np.sqrt(weights_N)[:, None], full_matrices=False)
    components_TD = axes[:NUM_COMPONENTS].T
    projected_ND = z_NT @ components_TD
    real = {name: Gaussian.of(projected_ND[y_N == index]) for index, name in enumerate(CLASSES)}
    return StyleSpace(components_TD, real)

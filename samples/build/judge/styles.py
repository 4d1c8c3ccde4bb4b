"""Fits the judge's style classifier and style space on real pictures.

Shapes: N pictures, T texture statistics, C classes, D principal components.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dora_mm.eval.images.style import CLASSES, STYLES, StyleClassifier, StyleSpace, class_of
from dora_mm.eval.statistics import Gaussian

NUM_FOLDS = 5
INVERSE_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # C of scikit-learn
NUM_COMPONENTS = 32
CLASS_FLAT, CLASS_3D = (list(CLASSES).index(name) for name in ("flat", "3d"))


def fit_styles(
    texture: Mapping[str, np.ndarray], codes: Mapping[str, Sequence[str]], deciding: slice = slice(None)
) -> tuple[StyleClassifier, StyleSpace, dict[str, np.ndarray]]:
    """Fits on real pictures of every style, each (N, T) with the concept code of each row.

    Classes weigh the same, and so do the styles within one. The penalty is the strongest whose cross-validated log loss
    lies within one standard error of the best: what is classified later are drawn pictures, which differ from the real
    ones, and a flatter classifier bends less.

    The boundary between flat and 3D is then put where, among the rows `deciding`, as many fluent flat icons pass for 3D
    as the other way round. Left alone it is drawn by twemoji and high contrast, which nobody takes for 3D, and a fifth
    of the fluent flat ones lie beyond it once the UNet has left its traces on them.

    Returns:
        classifier, space, and for every style the predicted class index of each row by classifiers that have not seen
        its concept (folds of whole concepts).
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
    predicted = {style: (found_NC + shift_C).argmax(axis=1) for style, found_NC in unseen.items()}
    return classifier, _fit_space(classifier.standardize(x_NT), y_N, weights_N), predicted


def _margin(log_probabilities_NC: np.ndarray) -> np.ndarray:
    return log_probabilities_NC[:, CLASS_3D] - log_probabilities_NC[:, CLASS_FLAT]


def equal_errors(low: np.ndarray, high: np.ndarray) -> float:
    """The threshold that as large a share of `low` exceeds as of `high` falls short of."""
    found = np.sort(np.concatenate([low, high]))
    between = (found[1:] + found[:-1]) / 2
    too_high = (low[None] > between[:, None]).mean(axis=1)
    too_low = (high[None] < between[:, None]).mean(axis=1)
    return float(between[np.abs(too_high - too_low).argmin()])


def _cross_validate(x_NT, y_N, weights_N, folds) -> tuple[float, np.ndarray]:
    """The chosen inverse penalty, and the log probabilities that it gives each row while its fold is left out."""
    losses, outputs = np.empty((len(INVERSE_PENALTIES), len(folds))), []
    for row, penalty in enumerate(INVERSE_PENALTIES):
        unseen_NC = np.empty((len(x_NT), len(CLASSES)))
        for column, (seen, left_out) in enumerate(folds):
            model = _fit(x_NT[seen], y_N[seen], weights_N[seen], penalty)
            unseen_NC[left_out] = model.log_probabilities(x_NT[left_out])
            surprise = -unseen_NC[left_out, y_N[left_out]]
            losses[row, column] = np.average(surprise, weights=weights_N[left_out])
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
    scale_T[scale_T < 1e-6] = 1.0  # a channel that never changes
    model = LogisticRegression(C=penalty, max_iter=2000).fit((x_NT - mean_T) / scale_T, y_N, sample_weight=weights_N)
    return StyleClassifier(mean_T, scale_T, model.coef_, model.intercept_)


def _fit_space(z_NT: np.ndarray, y_N: np.ndarray, weights_N: np.ndarray) -> StyleSpace:
    _, _, axes = np.linalg.svd(z_NT * np.sqrt(weights_N)[:, None], full_matrices=False)
    components_TD = axes[:NUM_COMPONENTS].T
    projected_ND = z_NT @ components_TD
    real = {name: Gaussian.of(projected_ND[y_N == index]) for index, name in enumerate(CLASSES)}
    return StyleSpace(components_TD, real)

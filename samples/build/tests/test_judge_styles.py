"""The style classifier that the judge is fitted with, on synthetic textures."""

import numpy as np
import pytest

from dora_mm.eval.images.style import CLASSES, STYLES, log_odds
from samples.build.judge.styles import CLASS_3D, CLASS_FLAT, class_of, equal_errors, fit_styles

NUM_CONCEPTS, WIDTH = 30, 12


def synthetic(signal: float, seed: int = 0):
    """Texture with one direction per class, and a large one per concept that is independent of the style."""
    rng = np.random.default_rng(seed)
    per_concept = 3 * rng.normal(size=(NUM_CONCEPTS, WIDTH))
    per_concept[:, :3] = 0
    texture = {}
    for style in STYLES:
        x = per_concept + rng.normal(size=(NUM_CONCEPTS, WIDTH))
        x[:, list(CLASSES).index(class_of(style))] += signal
        texture[style] = x
    codes = [f"c{index}" for index in range(NUM_CONCEPTS)]
    return texture, dict.fromkeys(STYLES, codes)


def test_learns_the_classes_and_reports_on_unseen_concepts():
    classifier, space, predicted = fit_styles(*synthetic(6.0))
    fresh, _ = synthetic(6.0, seed=1)
    for style in STYLES:
        expected = list(CLASSES).index(class_of(style))
        assert (classifier.log_probabilities(fresh[style]).argmax(axis=1) == expected).mean() > 0.9
        assert (predicted[style] == expected).mean() > 0.85
    own = space.distance(space.project(classifier.standardize(fresh["brick"])), "brick")
    other = space.distance(space.project(classifier.standardize(fresh["flat"])), "brick")
    assert own < other


def test_without_a_signal_the_cross_validated_accuracy_is_chance():
    """Six styles of one concept share a fold: memorised concepts would show as accuracy here."""
    _, _, predicted = fit_styles(*synthetic(0.0))
    balanced = np.mean(
        [
            np.mean([(predicted[style] == list(CLASSES).index(name)).mean() for style in styles])
            for name, styles in CLASSES.items()
        ]
    )
    assert 0.2 < balanced < 0.47


def test_classes_have_equal_weight_for_any_number_of_icons():
    texture, codes = synthetic(1.0)
    fewer = {style: x[:10] if style == "brick" else x for style, x in texture.items()}
    fewer_codes = {style: names[:10] if style == "brick" else names for style, names in codes.items()}
    classifier, _, _ = fit_styles(fewer, fewer_codes)
    fresh, _ = synthetic(1.0, seed=1)
    p = np.exp(classifier.log_probabilities(np.concatenate(list(fresh.values()))))
    weights = np.repeat([1 / len(CLASSES[class_of(style)]) for style in STYLES], NUM_CONCEPTS)
    assert np.average(p, axis=0, weights=weights) == pytest.approx(1 / 3, abs=0.08)


def test_fluent_flat_and_3d_are_mistaken_equally_often():
    """Flat icons that resemble 3D icons a little move the boundary; unmistakable styles do not."""
    texture, codes = synthetic(3.0)
    texture["flat"][:, CLASS_3D] += 2.0
    _, _, predicted = fit_styles(texture, codes)
    errors = (predicted["flat"] != CLASS_FLAT).mean(), (predicted["3d"] != CLASS_3D).mean()
    assert abs(errors[0] - errors[1]) <= 2 / NUM_CONCEPTS
    assert 0 < sum(errors) < 0.8


@pytest.mark.parametrize(("low", "high", "where"), [([0, 1, 2], [3, 4, 5], 2.5), ([0, 1, 4], [3, 5, 6], 3.5)])
def test_equal_errors(low, high, where):
    assert equal_errors(np.array(low, float), np.array(high, float)) == where


def test_log_odds():
    p = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]])
    assert log_odds(np.log(p), "3d") == pytest.approx(np.log([0.7 / 0.3, 0.25 / 0.75]))
    certain = np.array([[-800.0, 0.0, -900.0]])  # 1 - p is 0 in floating point
    assert log_odds(certain, "3d") == pytest.approx([800.0])

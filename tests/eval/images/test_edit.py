"""Scores of edits: copying the reference gains nothing, and what should stay is told from what should not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.eval.images import edit
from dora_mm.eval.images.concepts import unit_rows


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_a_copy_gains_nothing_and_the_target_all(num_pairs, num_seeds, width, seed):
    draw = np.random.default_rng(seed)
    targets, references = (unit_rows(draw.normal(size=(num_pairs, width))) for _ in range(2))

    def nearer(of_images):
        return edit.vector_scores(np.repeat(of_images[:, None], num_seeds, axis=1), targets, references)[edit.NEARER]

    np.testing.assert_allclose(nearer(references), 0, atol=1e-9)
    np.testing.assert_allclose(nearer(targets), 1, atol=1e-9)
    np.testing.assert_allclose(nearer(2 * references - targets), -1, atol=1e-9)  # as far away on the other side


def test_pairs_of_one_image_are_left_out():
    targets = unit_rows(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    references = targets[[0, 0, 0]]
    scores = edit.vector_scores(references[:, None], targets, references)
    assert np.isnan(scores[edit.NEARER][0]).all()
    found = edit.confidence_intervals(scores)
    assert found[edit.NEARER].mean == pytest.approx(0)
    assert found[edit.LIKENESS].mean == pytest.approx((1 + 0 + np.sqrt(0.5)) / 3)


def test_what_should_stay_is_where_target_and_reference_agree():
    reference = np.zeros((4, 5, 3))
    target, result = reference.copy(), reference.copy()
    target[:2, :, 1] = 0.3
    kept = edit.kept_pixels(target, reference, 0.1)
    assert kept.sum() == 10
    result[:2] = 1
    assert edit.changed_pixels(result, reference, kept) == 0
    result[3, 0] = 0.5
    assert edit.changed_pixels(result, reference, kept) == pytest.approx(0.5 / 10)
    assert np.isnan(edit.changed_pixels(result, reference, np.zeros((4, 5), dtype=bool)))


def test_the_conclusion_follows_from_the_scores():
    one = edit.confidence_intervals({edit.NEARER: np.array([[0.3], [0.31], [0.29]])})[edit.NEARER]
    none = edit.confidence_intervals({edit.NEARER: np.array([[0.3], [-0.3], [0.0]])})[edit.NEARER]
    assert edit.conclusion(one, one, one) == (
        "The results are nearer to the targets than the references are (+0.300 (+0.275 to +0.325))."
    )
    assert "not shown to be nearer" in edit.conclusion(none, one, one)
    assert "The bare model is not shown to do worse. Nothing shows that the references" in edit.conclusion(
        one, none, none
    )
    assert "no edit to score" in edit.conclusion(None, None, None)

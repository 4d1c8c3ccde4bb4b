"""Scores of one's own style: what likeness, variety and drift are on vectors that are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.images import own_style
from dora_mm.eval.images.concepts import unit_rows
from dora_mm.sampling.own_style import vectors_by

X, Y = np.eye(2)


def test_likeness_is_the_mean_cosine_and_the_nearest_one():
    found = own_style.likeness(np.stack([X, unit_rows(X + Y)]), np.stack([X, Y]))
    np.testing.assert_allclose(found[own_style.LIKENESS], [0.5, 0.5**0.5])
    np.testing.assert_allclose(found[own_style.NEAREST], [1.0, 0.5**0.5])


def test_variety_and_drift():
    assert own_style.variety(np.stack([X, X, X])).tolist() == [0, 0, 0]
    np.testing.assert_allclose(own_style.variety(np.stack([X, Y, Y])), [1, 0.5, 0.5])
    assert own_style.drift(np.stack([X, Y]), np.stack([X, X])).tolist() == [0, 1]


def test_training_pictures_are_compared_with_the_others():
    found = own_style.among_themselves(np.stack([X, X, Y]))
    np.testing.assert_allclose(found[own_style.LIKENESS], [0.5, 0.5, 0])
    np.testing.assert_allclose(found[own_style.NEAREST], [1, 1, 0])


def test_differences_are_paired_and_rows_show_what_they_have():
    rng = np.random.default_rng(0)
    first, training = unit_rows(rng.normal(size=(8, 5))), unit_rows(rng.normal(size=(3, 5)))
    bare, adapted = own_style.scores_of(first, training), own_style.scores_of(first, training, None, first)
    found = own_style.differences(adapted, bare, 2)
    assert set(found) == {own_style.LIKENESS, own_style.NEAREST, own_style.VARIETY}
    assert found[own_style.LIKENESS].low <= 0 <= found[own_style.LIKENESS].high
    rows = {"bare": own_style.intervals(bare, 2), "adapter": own_style.intervals(adapted, 2)}
    assert rows["adapter"][own_style.DRIFT].mean == pytest.approx(0)
    bare_line = own_style.own_style_table(rows).splitlines()[2]
    assert bare_line.endswith("| - |")
    assert "likeness to the prompt" not in own_style.own_style_table(rows)


def test_an_open_clip_model_reads_the_prompts_too(clip_folder, tmp_path):
    vectors = vectors_by(str(clip_folder), torch.device("cpu"))
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    drawn, texts = vectors.of_images(images), vectors.of_texts(["red", "blue"])
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([drawn, texts]), axis=1), 1, rtol=1e-5)
    row = own_style.intervals(own_style.scores_of(drawn, drawn, texts), 1)
    assert "likeness to the prompt" in own_style.own_style_table({"bare": row})
    with pytest.raises(ValueError, match="clip_model: "):
        vectors_by(str(tmp_path), torch.device("cpu"))

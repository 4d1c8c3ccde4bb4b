"""Fitting the judge: the icons that it is fitted on, and what the small model leaves of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.images.prompts import fill
from samples.build.judge.icons import icon_paths, read_icon_concepts
from samples.build.recipes.fit_judge import through_model


def test_icons(icons, concepts, tmp_path):
    assert read_icon_concepts(icons) == concepts
    assert len(icon_paths(icons, "brick", concepts)) == len(concepts)
    with pytest.raises(ValueError, match=r"samples\.build icons"):
        read_icon_concepts(tmp_path)
    (tmp_path / "brick").mkdir()
    with pytest.raises(ValueError, match="pictures are missing"):
        icon_paths(tmp_path, "brick", concepts)
    assert fill("a flat icon of {thing}", concepts[0]) == "a flat icon of a judged thing 0"


def test_through_the_vae_alone(tiny, icons):
    """The pipeline's own decoding of the posterior's mean, at the model's size; one level of rounding."""
    path = icons / "flat" / "b00.webp"
    found = np.asarray(through_model(tiny, [path], progress="test")[0])
    image = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = tiny.vae.decode(tiny.vae.encode(pixels).latent_dist.mode()).sample
    expected = tiny.pipeline().image_processor.postprocess(decoded, output_type="np")[0]
    assert found / 255 == pytest.approx(expected, abs=1 / 255)


def test_what_passes_the_model_is_blurred_a_little_and_the_same_every_time(tiny, icons):
    path = icons / "flat" / "b00.webp"
    clean, early, late, again = (
        np.asarray(through_model(tiny, [path], times, progress="test")[0]).astype(float)
        for times in (None, *(torch.tensor([time]) for time in (1, 900, 900)))
    )
    assert np.array_equal(late, again)
    assert 0 < np.abs(early - clean).mean() < np.abs(late - clean).mean()

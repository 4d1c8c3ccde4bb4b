"""Fitting the judge: the icons that it is fitted on, passed through the small model."""

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.images.prompts import fill
from samples.build.pretraining.icons import Icon, read_icons
from samples.build.recipes.fit_judge import through_model


@pytest.fixture
def icon(icons, concepts):
    """A flat icon that the gallery contains."""
    (concept,) = [concept for concept in concepts if concept.code == "b00"]
    return Icon(concept, "flat", icons / "flat" / "b00.webp")


def test_icons(icons, concepts, tmp_path):
    assert [found.concept for found in read_icons(icons, ["brick"])] == concepts
    with pytest.raises(ValueError, match=r"concepts\.json.* samples\.build icons"):
        read_icons(tmp_path, ["brick"])
    (tmp_path / "concepts.json").write_text((icons / "concepts.json").read_text())
    (tmp_path / "brick").mkdir()
    with pytest.raises(ValueError, match=rf"{len(concepts)} images are missing.*{concepts[0].code}\.webp"):
        read_icons(tmp_path, ["brick"])
    assert fill("a flat icon of {thing}", concepts[0]) == "a flat icon of a judged thing 0"


def test_through_the_vae_alone(tiny, icon):
    """Equals the pipeline's decoding of the posterior's mean at the model's resolution, up to one level of rounding."""
    found = np.asarray(through_model(tiny, [icon], progress="test")[0])
    image = Image.open(icon.path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = tiny.vae.decode(tiny.vae.encode(pixels).latent_dist.mode()).sample
    expected = tiny.pipeline().image_processor.postprocess(decoded, output_type="np")[0]
    assert found / 255 == pytest.approx(expected, abs=1 / 255)


def test_denoising_changes_an_icon_more_from_a_later_timestep_and_is_reproducible(tiny, icon):
    clean, early, late, again = (
        np.asarray(through_model(tiny, [icon], times, progress="test")[0]).astype(float)
        for times in (None, *(torch.tensor([time]) for time in (1, 900, 900)))
    )
    assert np.array_equal(late, again)
    assert 0 < np.abs(early - clean).mean() < np.abs(late - clean).mean()

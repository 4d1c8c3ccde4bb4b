"""Scores of one's own style: what likeness, variety and drift are on vectors that are known."""

import numpy as np
import pytest
import timm
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from dora_mm.config.generation import AdapterChoice, EvalStyleConfig
from dora_mm.data.images.buckets import choose_bucket, frame
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.data.images.pixels import load_rgb, render
from dora_mm.eval.images import own_style
from dora_mm.eval.images.concepts import unit_rows
from dora_mm.eval.statistics import mean_ci
from dora_mm.sampling.own_style import vectors_by
from dora_mm.sampling.reconstructed import reconstructed

X, Y = np.eye(2)


def cells_of(drawn, training, num_seeds=1, **others):
    return own_style.scores_of(np.stack(drawn), np.stack(training), num_seeds, **others).cells


def test_likeness_is_the_mean_cosine_and_the_nearest_one():
    found = cells_of([X, unit_rows(X + Y)], [X, Y])
    np.testing.assert_allclose(found[own_style.LIKENESS], [0.5, 0.5**0.5])
    np.testing.assert_allclose(found[own_style.NEAREST], [1.0, 0.5**0.5])


def test_variety_and_drift():
    assert cells_of([X, X, X], [X])[own_style.VARIETY].tolist() == [0, 0, 0]
    np.testing.assert_allclose(cells_of([X, Y, Y], [X])[own_style.VARIETY], [1, 0.5, 0.5])
    assert cells_of([X, Y], [X], bare_ND=np.stack([X, X]))[own_style.DRIFT].tolist() == [0, 1]
    assert own_style.VARIETY not in cells_of([X], [X])  # of one image


def test_training_images_are_compared_with_the_others():
    found = own_style.among_themselves(np.stack([X, X, Y])).cells
    np.testing.assert_allclose(found[own_style.LIKENESS], [0.5, 0.5, 0])
    np.testing.assert_allclose(found[own_style.NEAREST], [1, 1, 0])
    assert own_style.confidence_intervals(own_style.among_themselves(X[None])) == {}


def test_differences_are_paired_and_rows_show_what_they_have():
    rng = np.random.default_rng(0)
    first, training = unit_rows(rng.normal(size=(8, 5))), unit_rows(rng.normal(size=(3, 5)))
    bare, adapted = own_style.scores_of(first, training, 2), own_style.scores_of(first, training, 2, None, first)
    found = own_style.differences(adapted, bare)
    assert set(found) == {own_style.LIKENESS, own_style.NEAREST, own_style.VARIETY}
    assert found[own_style.LIKENESS].low <= 0 <= found[own_style.LIKENESS].high
    rows = {"bare": own_style.confidence_intervals(bare), "adapter": own_style.confidence_intervals(adapted)}
    assert rows["adapter"][own_style.DRIFT].mean == pytest.approx(0)
    bare_line = own_style.own_style_table(rows).splitlines()[2]
    assert bare_line.endswith("| - |")
    assert "likeness to the prompt" not in own_style.own_style_table(rows)


def drawn(rng, num_prompts, num_seeds):
    """Unit vectors of images that share a part by prompt."""
    prompts = 2 * np.eye(16)[0] + rng.normal(size=(num_prompts, 1, 16))
    return unit_rows((prompts + 0.5 * rng.normal(size=(num_prompts, num_seeds, 16))).reshape(-1, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_images", "num_seeds"),
    [(own_style.VARIETY, 8, 2), (own_style.LIKENESS, 20, 1), (own_style.NEAREST, 20, 1)],
)
def test_confidence_intervals_of_pairs_of_images_cover_the_truth(name, num_images, num_seeds):
    """The bootstrap over images misses 26 to 43 %: an image is in many pairs."""
    rng = np.random.default_rng(2)

    def scores():
        vectors = drawn(rng, num_images, num_seeds)
        few = own_style.scores_of(vectors, vectors[:1], num_seeds)
        return few if num_seeds > 1 else own_style.among_themselves(vectors)

    truth = np.mean([scores().mean(name, np.arange(num_images)) for _ in range(4000)])
    found = [own_style.confidence_intervals(scores())[name] for _ in range(1000)]
    assert 0.005 < np.mean([not each.low <= truth <= each.high for each in found]) < 0.075


def test_the_ci_of_variety_is_that_of_pairs_and_not_of_images():
    scores = own_style.scores_of(drawn(np.random.default_rng(1), 8, 2), np.eye(16)[:2], 2)
    found, cells = own_style.confidence_intervals(scores)[own_style.VARIETY], scores.cells[own_style.VARIETY]
    assert found.mean == pytest.approx(cells.mean())
    of_images = mean_ci(cells.reshape(-1, 2), over_runs=False)
    assert found.high - found.low > 1.5 * (of_images.high - of_images.low)


def test_a_model_of_timm_with_its_own_preprocessing(timm_folder, tmp_path):
    """DINOv2's architecture with random weights, against timm itself."""
    vectors = vectors_by(torch.device("cpu"), timm_model=str(timm_folder))
    images = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images])).numpy()
    np.testing.assert_allclose(vectors.of_images(images), unit_rows(expected), atol=1e-6)
    assert vectors.of_texts is None
    with pytest.raises(ValueError, match="timm_model: .* contains no weights"):
        vectors_by(torch.device("cpu"), timm_model=str(tmp_path))
    with pytest.raises(ValueError, match="give either clip_model or timm_model"):
        EvalStyleConfig(
            pipeline="eval_style",
            name="a",
            adapter=AdapterChoice(path="a.safetensors"),
            timm_model=str(timm_folder),
            clip_model=str(timm_folder),
        )


def test_training_images_are_seen_through_the_size_and_the_vae_of_the_model(tiny, image_folder):
    """Encoded and decoded by diffusers' own VAE, at the size to which a training brings them."""
    images = read_captioned_images(image_folder, instance_prompt="a")
    found = reconstructed(tiny, images, "white")
    for image, loaded_image in zip(images, found, strict=True):
        framing = frame(image.size, choose_bucket(image.size, tiny.resolution))
        with torch.no_grad():
            latents = tiny.vae.encode(render(load_rgb(image.path), framing)[None]).latent_dist.mode()
            expected = VaeImageProcessor().postprocess(tiny.vae.decode(latents).sample)[0]
        assert np.abs(np.asarray(loaded_image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
        assert loaded_image.size == framing.target_size[::-1]


def test_an_open_clip_model_reads_the_prompts_too(clip_folder, tmp_path):
    vectors = vectors_by(torch.device("cpu"), str(clip_folder))
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    loaded_images, texts = vectors.of_images(images), vectors.of_texts(["red", "blue"])
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([loaded_images, texts]), axis=1), 1, rtol=1e-5)
    row = own_style.confidence_intervals(own_style.scores_of(loaded_images, loaded_images, 1, texts))
    assert "likeness to the prompt" in own_style.own_style_table({"bare": row})
    with pytest.raises(ValueError, match="clip_model: "):
        vectors_by(torch.device("cpu"), str(tmp_path))

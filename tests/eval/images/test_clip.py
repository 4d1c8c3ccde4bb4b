import numpy as np
import open_clip
import pytest
from PIL import Image

from dora_mm.eval.images.clip import ClipSimilarity


@pytest.fixture(scope="module")
def sample_images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(5)]


def test_similarities_equal_those_of_open_clip(clip_folder, sample_images):
    clip = ClipSimilarity(str(clip_folder))
    texts = [f"an image of concept {index}" for index in range(5)]
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    import torch

    with torch.no_grad():
        image_features = torch.nn.functional.normalize(
            model.encode_image(torch.stack([preprocess(p) for p in sample_images]))
        )
        text_features = torch.nn.functional.normalize(model.encode_text(open_clip.tokenize(texts)))
    assert clip.to_texts(sample_images, texts) == pytest.approx(
        (image_features * text_features).sum(dim=1).numpy(), abs=1e-5
    )
    assert clip.to_images(sample_images, sample_images[:2]) == pytest.approx(
        (image_features @ image_features[:2].T).mean(dim=1).numpy(), abs=1e-5
    )
    assert clip.to_images(sample_images[:1], sample_images[:1]) == pytest.approx([1.0], abs=1e-5)


def test_a_folder_without_a_model_or_its_weights(tmp_path):
    with pytest.raises(ValueError, match=r"clip.path: .*open_clip_config.json"):
        ClipSimilarity(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"clip.path: .*no weights"):
        ClipSimilarity(str(tmp_path))

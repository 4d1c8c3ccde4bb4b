import numpy as np
import open_clip
import pytest
from PIL import Image

from dora_mm.eval.images.clip import ClipSimilarity


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(5)]


def test_similarities_are_open_clips_own(clip_folder, pictures):
    clip = ClipSimilarity(str(clip_folder))
    texts = [f"a picture of thing {index}" for index in range(5)]
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    import torch

    with torch.no_grad():
        images = torch.nn.functional.normalize(model.encode_image(torch.stack([preprocess(p) for p in pictures])))
        words = torch.nn.functional.normalize(model.encode_text(open_clip.tokenize(texts)))
    assert clip.to_texts(pictures, texts) == pytest.approx((images * words).sum(dim=1).numpy(), abs=1e-5)
    assert clip.to_images(pictures, pictures[:2]) == pytest.approx(
        (images @ images[:2].T).mean(dim=1).numpy(), abs=1e-5
    )
    assert clip.to_images(pictures[:1], pictures[:1]) == pytest.approx([1.0], abs=1e-5)


def test_a_folder_without_a_model_or_its_weights(tmp_path):
    with pytest.raises(ValueError, match=r"clip.path: .*open_clip_config.json"):
        ClipSimilarity(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"clip.path: .*no weights"):
        ClipSimilarity(str(tmp_path))

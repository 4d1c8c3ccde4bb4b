import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.images.encoder import concatenate, to_input
from dora_mm.models.vl.towers.efficientnet import load_efficientnet_lite0


@pytest.fixture(scope="module")
def sample_images():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((side * 3, side * 3))
        for side in (20, 31, 40)
    ]


def test_content_starts_with_what_timm_pools(encoder, sample_images):
    model = load_efficientnet_lite0()
    batch = torch.stack([to_input(image) for image in sample_images])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True).numpy()
    found = encoder(sample_images)
    assert found.content[:, :1280] == pytest.approx(expected, abs=1e-4)
    assert found.content.shape == (3, 2304)
    assert found.texture.shape == (3, 608)


def test_texture_is_the_channels_mean_and_standard_deviation(encoder, sample_images):
    """Against the inputs of blocks of the timm model: the output of the stem is the input of the first block."""
    inputs = []
    model = load_efficientnet_lite0()
    for module in (model.blocks[0], model.blocks[1], model.blocks[5]):
        module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(torch.stack([to_input(image) for image in sample_images]))
    stem, first, fifth = (torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1).numpy() for x in inputs)
    texture = encoder(sample_images).texture
    assert texture[:, :64] == pytest.approx(stem, abs=1e-4)
    assert texture[:, 64:96] == pytest.approx(first, abs=1e-4)
    assert texture[:, -224:] == pytest.approx(fifth, abs=1e-4)


def test_features_do_not_depend_on_the_batch(encoder, sample_images):
    batched, single = encoder(sample_images), concatenate([encoder([image]) for image in sample_images])
    assert batched.texture == pytest.approx(single.texture, abs=1e-4)
    assert len(batched) == 3
    assert batched[np.array([2, 0])].content == pytest.approx(batched.content[[2, 0]])

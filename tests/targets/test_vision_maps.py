"""The maps of vision transformers on their towers: every adapter is called, and a fresh one changes nothing."""

import json

import open_clip
import pytest
import torch

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, remove
from dora_mm.config.models import VisionConfig
from dora_mm.models.vl.towers.tower import load_tower, tower_map
from tests.shared import reference

VIT = {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8}
OF_TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
SMALL = {"vit": VIT, "even": VIT | {"head_width": 12}, "coca": VIT | {"attentional_pool": True}, "timm": OF_TIMM}
TOWERS = {  # tower, layers -> its map, modules of attention and of MLPs
    ("map-vit", ()): ("open-clip-visual", 12, 6),
    ("map-even", ()): ("open-clip-visual", 12, 6),
    ("map-coca", ()): ("open-clip-visual", 12, 6),
    ("map-vit", ("transformer.resblocks.0", "transformer.resblocks.1")): ("open-clip-visual", 8, 4),
    ("map-timm", ()): ("timm-vit", 24, 24),
    ("timm/vit_tiny_patch16_224", ("blocks.2",)): ("timm-vit", 6, 6),
    ("timm/deit_tiny_distilled_patch16_224", ("blocks.1",)): ("timm-vit", 4, 4),
}
PARTS = ("vision.attn", "vision.mlp")


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1}
    for name, vision in SMALL.items():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (folder / f"map-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def tower_and_pixels(tower, layers=()):
    loaded = load_tower(VisionConfig(tower=tower, pretrained=None, layers=layers))
    return loaded, torch.randn(1, 3, *loaded.preprocess.size)


@pytest.mark.parametrize(("tower", "layers"), TOWERS)
def test_every_adapter_is_called_and_a_fresh_one_changes_no_bit(tower, layers):
    name, num_attn, num_mlp = TOWERS[tower, layers]
    model, x = tower_and_pixels(tower, layers)
    x.requires_grad_()  # as in training; in inference torch fuses attention, which rounds differently
    before = model(x)
    assert tower_map(model) == name
    report = dora_mm.inject(model, name, DoRASpec(rank=2), parts=PARTS)
    parts = [module.part for module in report.modules]
    assert tuple(map(parts.count, PARTS)) == (num_attn, num_mlp)
    assert torch.equal(model(x), before)
    for module in report.modules:
        reference.randomize(model.get_submodule(module.path))
    changed = model(x)
    assert not torch.allclose(changed, before)
    trained = adapter_parameters(model)
    gradients = torch.autograd.grad(changed.square().sum(), list(trained.values()))
    without_gradient = [name for name, gradient in zip(trained, gradients, strict=True) if not gradient.any()]
    assert without_gradient == []
    remove(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("tower", ["map-even", "timm/vit_tiny_patch16_224"])
def test_a_fresh_adapter_in_inference(tower):
    model, x = tower_and_pixels(tower)
    with torch.no_grad():
        before = model(x)
        dora_mm.inject(model, tower_map(model), DoRASpec(rank=2))
        torch.testing.assert_close(model(x), before)


def test_attention_alone_is_the_default():
    model, _ = tower_and_pixels("map-vit")
    report = dora_mm.inject(model, tower_map(model), DoRASpec(rank=2))
    names = {module.path.rpartition(".")[2] for module in report.modules}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert report.num_modules == 12


@pytest.mark.parametrize("tower", ["RN50", "timm/resnet10t", "timm/swin_tiny_patch4_window7_224"])
def test_towers_without_a_map(tower):
    with torch.device("meta"):
        model, _ = tower_and_pixels(tower)
    assert tower_map(model) is None


def test_full_size_counts():
    """ViT-B-32: 12 blocks of 4 projections and 2 layers of an MLP."""
    with torch.device("meta"):
        model, _ = tower_and_pixels("ViT-B-32")
    report = dora_mm.inject(model, tower_map(model), DoRASpec(rank=8), parts=PARTS)
    assert report.num_modules == 72
    attention, mlp = 4 * (8 * (768 + 768) + 768), 2 * 8 * (768 + 3072) + 768 + 3072
    assert report.num_parameters == 12 * (attention + mlp)

"""Towers of open_clip and timm: their features and weights, and the errors for wrong configs."""

import copy
import json
import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from dora_mm import DoRASpec
from dora_mm.config.models import VisionConfig
from dora_mm.core import inject
from dora_mm.eval.images.encoder import to_input
from dora_mm.models.vl.towers.building import LITE0
from dora_mm.models.vl.towers.tower import VisionTower, load_tower

TEXT = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 3, "layers": 4}
VIT = {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
COCA = VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
MEAN_POOLED = VIT | {"pool_type": "avg", "final_ln_after_pool": True}
OF_TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
SMALL = {"ViT": VIT, "ViT-deep": VIT | {"layers": 4}, "RN": RESNET, "coca": COCA, "mean": MEAN_POOLED, "timm": OF_TIMM}


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    for name, vision in SMALL.items():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": name == "timm"}
        (folder / f"small-{name}.json").write_text(json.dumps(config))
        (folder / f"small-{name}-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)


def tower_of(tower, layers=(), pretrained=None):
    return load_tower(
        VisionConfig(tower=tower, pretrained=None if pretrained is None else str(pretrained), layers=layers)
    )


def complete_clip(name):
    return open_clip.create_model(name).eval().requires_grad_(False)


def pixels(tower, count=2):
    return torch.randn(count, 3, *tower.preprocess.size, generator=torch.Generator().manual_seed(1))


# --- features --------------------------------------------------------------------------------------------------------


def test_rn101_gives_its_last_map_before_the_attention_pool():
    tower = tower_of("RN101")
    assert (tower.feature_dim, tower.grid, tower.num_tokens) == (2048, (7, 7), 49)
    assert tower.preprocess.size == (224, 224)
    x = pixels(tower, 1)
    trunk = tower.trunk
    for bottleneck in (block for layer in (trunk.layer1, trunk.layer4) for block in layer):
        nn.init.ones_(bottleneck.bn3.weight)  # initially zero, which would hide everything but the shortcuts
    by_hand = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(x)))))
    found = tower(x)
    assert found.shape == (1, 49, 2048)
    torch.testing.assert_close(found[0, 7 * 2 + 3], by_hand[0, :, 2, 3])  # row 2, column 3
    torch.testing.assert_close(found, by_hand.flatten(2).mT)
    assert isinstance(trunk.attnpool, nn.Identity)


@pytest.mark.parametrize("name", ["small-ViT", "small-ViT-quickgelu"])
def test_vit_gives_the_tokens_that_open_clip_gives_without_the_class(name, tmp_path):
    clip = complete_clip(name)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    tower = tower_of(name, pretrained=tmp_path / "clip.safetensors")
    clip.visual.output_tokens = True
    x = pixels(tower)
    assert (tower.feature_dim, tower.grid) == (24, (4, 4))
    torch.testing.assert_close(tower(x), clip.visual(x)[1])
    assert tower.name == name


@pytest.mark.parametrize("name", ["small-coca", "small-mean"])
def test_a_norm_that_was_trained_on_pooled_values_is_left_out(name):
    tower = tower_of(name)
    assert tower.layers == ("transformer",)
    x = pixels(tower)
    theirs = tower.trunk.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(tower(x), theirs["image_intermediates"][0])
    assert isinstance(tower.trunk.ln_post, nn.Identity)


def test_open_clips_towers_of_timm_are_timms(tmp_path):
    clip = complete_clip("small-timm")
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    tower = tower_of("small-timm", pretrained=tmp_path / "clip.safetensors")
    x = pixels(tower, 1)
    torch.testing.assert_close(tower(x), clip.visual.trunk.forward_features(x)[:, 1:])
    assert tower.preprocess.size == (224, 224)
    assert tower.preprocess.mean == tower_of("small-ViT").preprocess.mean


def test_swin_keeps_its_channels_last():
    tower = tower_of("timm/swin_tiny_patch4_window7_224")
    x = pixels(tower, 1)
    assert (tower.feature_dim, tower.grid) == (768, (7, 7))
    torch.testing.assert_close(tower(x), tower.trunk.forward_features(x).flatten(1, 2))


def test_layers_are_averaged_to_the_coarsest_grid_and_concatenated():
    tower = tower_of("timm/resnet10t", ("layer4", "layer1", "layer2"))
    assert (tower.feature_dim, tower.grid) == (512 + 64 + 128, (6, 6))
    x = pixels(tower)
    trunk = tower.trunk
    stem = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
    one = trunk.layer1(stem)
    two = trunk.layer2(one)
    four = trunk.layer4(trunk.layer3(two))
    expected = torch.cat([four, F.adaptive_avg_pool2d(one, 6), F.adaptive_avg_pool2d(two, 6)], dim=1)
    torch.testing.assert_close(tower.feature_map(x), expected)


def test_tokens_and_maps_are_concatenated():
    tower = tower_of("small-ViT", ("conv1", "transformer.resblocks.1"))
    assert (tower.feature_dim, tower.grid) == (48, (4, 4))
    x = pixels(tower)
    inner = tower.trunk.transformer.resblocks
    tokens = inner[1](inner[0](tower.trunk._embeds(x)))[:, 1:]
    torch.testing.assert_close(tower(x), torch.cat([tower.trunk.conv1(x).flatten(2).mT, tokens], dim=2))


def test_an_activation_in_place_does_not_change_a_map():
    tower = tower_of("small-RN", ("bn1", "layer1"))  # an activation in place follows bn1
    assert (tower.feature_map(pixels(tower))[:, :4] < 0).any()


def test_unused_modules_are_dropped():
    tower, complete = tower_of("small-ViT", ("transformer.resblocks.0",)), tower_of("small-ViT")
    blocks = tower.trunk.transformer.resblocks
    assert [isinstance(block, nn.Identity) for block in blocks] == [False, True, True]
    assert isinstance(tower.trunk.ln_post, nn.Identity)
    names = {name for name, _ in complete.named_parameters()}
    assert {name for name, _ in tower.named_parameters()} < names
    assert not any(parameter.is_meta for parameter in tower.parameters())


def test_towers_are_frozen_and_stay_in_eval_mode():
    tower = tower_of("timm/resnet10t")
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    before = copy.deepcopy(tower.state_dict())
    x = pixels(tower)
    expected = tower(x)
    assert torch.equal(tower.train()(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_dropout_of_adapters_follows_train():
    tower = tower_of("small-ViT")
    report = inject(tower, ["mlp.c_fc"], DoRASpec(rank=2, dropout=0.5))
    assert report.num_modules == 3
    layers = [tower.get_submodule(module.path) for module in report.modules]
    assert not any(layer.training for layer in layers)
    assert all(layer.training for layer in layers if tower.train())
    assert not tower.trunk.transformer.training
    assert not any(layer.training for layer in layers if tower.eval())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_give_the_same_features(copied):
    tower = tower_of("small-ViT", ("transformer.resblocks.1",))
    x = pixels(tower)
    twin = copied(tower)
    assert torch.equal(twin(x), tower(x))
    with torch.no_grad():
        twin.trunk.conv1.weight.zero_()
    assert not torch.equal(twin(x), tower(x))


# --- preprocessing ---------------------------------------------------------------------------------------------------


def random_image(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (301, 7)])
def test_images_are_resized_and_normalised_as_clip_does(size):
    tower = tower_of("small-RN")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    theirs = transforms.Compose(
        [
            transforms.Resize((64, 64), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    torch.testing.assert_close(tower.preprocess(random_image(*size)), theirs(random_image(*size)), atol=1e-5, rtol=1e-5)


def test_lite0_preprocesses_as_its_weights_were_trained():
    tower = tower_of("timm/tf_efficientnet_lite0", ("blocks.2", "blocks.4", "blocks.6"), LITE0)
    image = random_image(300, 200)
    assert torch.equal(tower.preprocess(image), to_input(image))
    assert (tower.feature_dim, tower.grid) == (472, (7, 7))
    assert tower(tower.preprocess(image)[None]).std() > 0.1


def test_timm_towers_take_timms_normalisation():
    tower = tower_of("timm/vit_tiny_patch16_224")  # 0.5 and 0.5, unlike most, which have ImageNet's
    assert tower.preprocess.mean == (127.5,) * 3
    assert tower.preprocess.std == (127.5,) * 3


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small-ViT", "small-RN", "small-timm"])
def test_weights_load_with_every_nesting_and_prefix(name, tmp_path):
    clip = complete_clip(name)
    visual = clip.visual
    expected = tower_of(name, pretrained=save(tmp_path / "a.safetensors", clip.state_dict()))
    x = pixels(expected, 1)
    for number, state in enumerate(
        [
            {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in clip.state_dict().items()}},
            visual.state_dict(),
            {f"visual.{key}": value for key, value in visual.state_dict().items()},
            expected.state_dict(),
        ]
    ):
        tower = tower_of(name, pretrained=save(tmp_path / f"{number}.pt", state))
        assert torch.equal(tower(x), expected(x))
        assert tower.identity == expected.identity


def save(path, state):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_timms_own_state_dict(tmp_path):
    network = timm.create_model("resnet10t").eval()
    tower = tower_of("timm/resnet10t", pretrained=save(tmp_path / "a.safetensors", network.state_dict()))
    x = pixels(tower)
    with torch.no_grad():
        torch.testing.assert_close(tower.feature_map(x), network.forward_features(x))


def test_half_precision_weights_become_float32(tmp_path):
    state = complete_clip("small-ViT").half().state_dict()
    tower = tower_of("small-ViT", pretrained=save(tmp_path / "a.safetensors", state))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert torch.equal(tower.trunk.conv1.weight, state["visual.conv1.weight"].float())


@pytest.mark.parametrize(
    ("of", "tower", "message"),
    [
        (
            "small-ViT-deep",
            "small-ViT",
            r"vision.tower: its visual.transformer.resblocks.3.* does not belong",
        ),
        ("small-ViT", "small-ViT-deep", r"it has no visual.transformer.resblocks.3.ln_1.weight"),
        ("small-RN", "small-ViT", r"it has no visual.class_embedding"),
        ("small-coca", "small-ViT", r"its visual.proj is \(16, 16\), not \(24, 16\)"),
    ],
)
def test_weights_of_another_tower_are_refused(tmp_path, of, tower, message):
    path = save(tmp_path / "a.safetensors", complete_clip(of).state_dict())
    with pytest.raises(ValueError, match=rf"^vision.pretrained: .*a.safetensors .*{message}"):
        tower_of(tower, pretrained=path)


def test_weights_of_another_size_are_refused(tmp_path):
    state = complete_clip("small-ViT").state_dict()
    state["visual.positional_embedding"] = torch.zeros(5, 24)
    with pytest.raises(ValueError, match=r"its visual.positional_embedding is \(5, 24\), not \(17, 24\)"):
        tower_of("small-ViT", pretrained=save(tmp_path / "a.pt", state))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_would_run_code_are_refused(tmp_path):
    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"weight": Trap(tmp_path / "sprung")}))
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Trap(tmp_path / "sprung")}, tmp_path / "trap2.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    for name in ("trap.pt", "trap2.pt", "script.pt"):
        (tmp_path / "sprung").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"vision.pretrained: .*{name} .*plain weights.*state dict"):
            tower_of("small-ViT", pretrained=tmp_path / name)
        assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_broken_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=rf"vision.pretrained: .*{name} .*plain weights"):
        tower_of("small-ViT", pretrained=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"vision.pretrained: .*list.pt is not a state dict"):
        tower_of("small-ViT", pretrained=tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"vision.pretrained: .*empty.pt .*vision.tower: it has no class_embedding"):
        tower_of("small-ViT", pretrained=tmp_path / "empty.pt")


def no_network(*args, **options):
    raise FileNotFoundError("Failed to download weights of it. Check your connection\nand so on")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    monkeypatch.setattr(timm, "create_model", no_network)
    for tower, tag in (("RN101", "openai"), ("timm/resnet10t", "c3_in1k")):
        reason = r"downloaded \(Failed to download weights of it\): .*local file"
        with pytest.raises(ValueError, match=rf"^vision.pretrained: .*{tag} of {tower} .*{reason}"):
            tower_of(tower, pretrained=tag)


def test_a_tag_sets_the_activation(monkeypatch, tmp_path):
    """OpenAI's weights need QuickGELU, also under the name without it."""
    path = save(tmp_path / "a.safetensors", complete_clip("small-ViT").state_dict())
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda name, tag: {"quick_gelu": True, "mean": (0.0, 0.0, 0.5)}
    )
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(path))
    tower = tower_of("small-ViT", pretrained="openai")
    same = tower_of("small-ViT-quickgelu", pretrained="openai")
    assert tower.name == "small-ViT-quickgelu"
    assert tower.preprocess.mean == (0.0, 0.0, 127.5)
    assert tower.identity == same.identity
    monkeypatch.undo()
    plain = tower_of("small-ViT", pretrained=path)
    assert plain.identity != tower.identity
    assert not torch.allclose(plain(pixels(plain)), tower(pixels(tower)))


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_identity_covers_weights_layers_and_preprocessing(tmp_path):
    path = save(tmp_path / "a.safetensors", complete_clip("small-ViT").state_dict())
    tower = tower_of("small-ViT", pretrained=path)
    assert tower.identity == tower_of("small-ViT", pretrained=path).identity
    others = [
        tower_of("small-ViT"),
        tower_of("small-ViT", ("transformer",), path),
        VisionTower("other", copy.deepcopy(tower.trunk), tower.layers, tower.preprocess),
        VisionTower(
            tower.name,
            copy.deepcopy(tower.trunk),
            tower.layers,
            type(tower.preprocess)((32, 32), (1.0,) * 3, (1.0,) * 3),
        ),
    ]
    assert len({tower.identity, *(other.identity for other in others)}) == 5


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "layers", "pretrained", "message"),
    [
        ("RN110", (), None, "vision.tower: open_clip has no 'RN110', did you mean 'RN101'?"),
        ("timm/resnet10", (), None, "vision.tower: timm has no 'resnet10', did you mean 'resnet1"),
        ("timm/resnet10t.c3_in1k", (), None, "vision.tower: .*timm/resnet10t, .*vision.pretrained .*c3_in1k"),
        ("timm/resnet10t", (), LITE0, "vision.pretrained: .* timm/tf_efficientnet_lite0, not for timm/resnet10t"),
        ("timm/resnet10t", (), "c3_in2k", r"vision.pretrained: c3_in2k .* a tag of timm/resnet10t \(c3_in1k\)"),
        ("RN101", (), "laion", r"vision.pretrained: laion .* a tag of RN101 \(openai, "),
        ("small-ViT", (), "openai", r"vision.pretrained: openai .* a tag \(small-ViT has none\)"),
        (
            "small-ViT",
            ("transformer.resblock.1",),
            None,
            "vision.layers: .*'transformer.resblock.1', did you mean 'transformer.res",
        ),
        ("small-ViT", ("transformer", "transformer"), None, "vision.layers .* twice"),
        ("small-RN", ("attnpool",), None, r"vision.layers: attnpool of small-RN gives \(1, 16\)"),
        ("small-ViT", ("transformer.resblocks.0.attn",), None, "vision.layers: .*attn of small-ViT gives tuple"),
        ("timm/resnet10t", ("layer1", "fc"), None, "vision.layers: fc of timm/resnet10t is not used"),
        (
            "timm/coat_lite_tiny",
            (),
            None,
            r"vision.layers: forward_features of timm/coat_lite_tiny gives \(1, 50, 320\)",
        ),
    ],
)
def test_wrong_configs_name_the_key(tower, layers, pretrained, message):
    with pytest.raises(ValueError, match=message):
        tower_of(tower, layers, pretrained)

"""Strengths by part and block: the longest name counts, and a wrong name is an error."""

import pytest
import torch
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, remove, save_adapter, set_strength
from dora_mm.core import adapted_layers
from dora_mm.core.strength import strengths_of
from dora_mm.targets import SHORT_NAMES
from tests.shared import reference

PATHS = [
    "unet.down_blocks.0.attn.to_q",
    "unet.down_blocks.10.attn.to_q",
    "unet.mid_block.attn.to_q",
    "unet.up_blocks.1.attn.to_q",
    "text_encoder.layers.0.q_proj",
    "text_encoder_2.layers.0.q_proj",
]


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (0.5, [0.5] * 6),
        ({}, [1] * 6),
        ({"": 2}, [2] * 6),
        ({"unet.down": 0.5}, [0.5, 0.5, 1, 1, 1, 1]),
        ({"unet.down_blocks": 0.5, "unet.down.1": 3}, None),
        ({"unet": 0, "unet.down.10": 2, "text_encoder": 0.5}, [0, 2, 0, 0, 0.5, 1]),
        ({"unet.up.1": 0.25, "unet.mid": 0, "": 0.5}, [0.5, 0.5, 0, 0.25, 0.5, 0.5]),
        ({"unet.mid_block.attn.to_q": 7}, [1, 1, 7, 1, 1, 1]),
    ],
)
def test_the_longest_name_counts(strength, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"no adapted module is in 'unet.down.1'.* unet.down_blocks.10"):
            strengths_of(strength, PATHS, SHORT_NAMES)
    else:
        assert list(strengths_of(strength, PATHS, SHORT_NAMES).values()) == expected


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"unet.dwn": 1}, r"no adapted module is in 'unet.dwn', the nearest names are unet.down_blocks"),
        ({"text_encoder_3": 1}, "text_encoder_2"),
        ({"unet.down": 1, "unet.down_blocks": 2}, "two names for one place"),
        ({"unet.down": float("nan")}, "the strength of unet.down must be a finite number"),
        ({"unet.down": "1"}, "the strength of unet.down must be a finite number"),
    ],
)
def test_wrong_names_and_numbers(strength, message):
    with pytest.raises(ValueError, match=message):
        strengths_of(strength, PATHS, SHORT_NAMES)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4)) for name in ("down_blocks", "mid_block", "up_blocks")})


def adapted():
    net = model()
    inject(net, ["0"], DoRASpec(rank=2))
    for seed, layer in enumerate(adapted_layers(net).values()):
        reference.randomize(layer, seed=seed)
    return net


X = torch.linspace(-1, 1, 8).view(2, 4)


def outputs(net):
    return {name: part(X) for name, part in net.items()}


def test_set_strength_by_block():
    net, bare = adapted(), outputs(model())
    full = outputs(net)
    set_strength(net, {"down": 0.5, "mid": 0})
    found = outputs(net)
    assert torch.equal(found["mid_block"], bare["mid_block"])
    assert torch.equal(found["up_blocks"], full["up_blocks"])
    torch.testing.assert_close(found["down_blocks"], (full["down_blocks"] + bare["down_blocks"]) / 2)
    set_strength(net, {"": 0})
    assert all(torch.equal(y, bare[name]) for name, y in outputs(net).items())
    with pytest.raises(ValueError, match="no adapted module is in 'encoder'"):
        set_strength(net, {"encoder": 1})
    with pytest.raises(ValueError, match="no adapter 'x', only default"):
        set_strength(net, 1, name="x")


@pytest.mark.parametrize("single", [True, False])
def test_two_adapters_with_strengths_by_block(tmp_path, single):
    net, bare = adapted(), outputs(model())
    full = outputs(net)
    save_adapter({"unet": net}, tmp_path)
    remove(net)
    target = net if single else {"unet": net}
    load_adapter(target, tmp_path, strength={"unet.down": 0.25, "unet": 0}, name="a")
    key = "up" if single else "unet.up"
    load_adapter(target, tmp_path, strength={key: 0.5, "unet": 0}, name="b")
    found = outputs(net)
    for name, t in (("down_blocks", 0.25), ("mid_block", 0), ("up_blocks", 0.5)):
        torch.testing.assert_close(found[name], bare[name] + t * (full[name] - bare[name]))
    assert torch.equal(found["mid_block"], bare["mid_block"])
    set_strength(net, 0)
    assert all(torch.equal(y, bare[name]) for name, y in outputs(net).items())
    before = net.state_dict()
    with pytest.raises(ValueError, match="nearest names are"):
        load_adapter(target, tmp_path, strength={"unet.dwn": 1}, name="c")
    assert net.state_dict().keys() == before.keys()


def test_short_names_stand_for_blocks_that_the_model_has():
    paths = ["up.proj", "down.proj"]
    assert strengths_of({"up": 0.5}, paths, SHORT_NAMES) == {"up.proj": 0.5, "down.proj": 1.0}
    with pytest.raises(ValueError, match="in 'up_blocks', the nearest names are up.proj, up, down"):
        strengths_of({"up_blocks": 0.5}, paths, SHORT_NAMES)

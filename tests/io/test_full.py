"""Weights trained by method full."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.io.state import read_tensors


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def trained():
    net = model()
    inject(net, ["0", "2"], DoRASpec(method="full"))
    for layer in adapted_layers(net).values():
        layer.weight.data.add_(1)
    return net


def test_round_trip(tmp_path):
    net = trained()
    file = save_adapter(net, tmp_path, format="full", metadata={"steps": "10"})
    assert file.name == "trained_weights.safetensors"
    for other in (model(), trained()):
        report = load_adapter(other, tmp_path)
        assert report.num_modules == 2
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


def test_what_does_not_fit(tmp_path):
    net = trained()
    with pytest.raises(ValueError, match="save it as format full"):
        save_adapter(net, tmp_path)
    save_adapter(net, tmp_path, format="full")
    with pytest.raises(ValueError, match="strength 1"):
        load_adapter(model(), tmp_path, strength=0.5)
    with pytest.raises(ValueError, match="another architecture"):
        load_adapter(nn.Sequential(nn.Linear(4, 5)), tmp_path)
    half = model()
    with pytest.raises(ValueError, match="half precision"):
        load_adapter(half.half(), tmp_path)
    dora = model()
    inject(dora, ["0", "2"], DoRASpec(rank=1))
    with pytest.raises(ValueError, match="save it as diffusers"):
        save_adapter(dora, tmp_path, format="full")
    tensors, header = read_tensors(tmp_path / "trained_weights.safetensors")
    tensors.pop("unet.2.weight")
    save_file(tensors, tmp_path / "trained_weights.safetensors", header)
    with pytest.raises(ValueError, match="holds 1 weights, its header says 2"):
        load_adapter(model(), tmp_path)
    save_file({"unet.0.weight": torch.ones(2)}, tmp_path / "trained_weights.safetensors")
    with pytest.raises(ValueError, match="its header lacks"):
        load_adapter(model(), tmp_path)

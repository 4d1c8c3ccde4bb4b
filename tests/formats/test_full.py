"""Weights trained by method full."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.formats.state import read_tensors


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


@pytest.mark.parametrize("method", ["full", "magnitude"])
def test_rank_and_alpha_are_ignored_without_matrices(tmp_path, method):
    net, other = model(), model()
    inject(net, ["0", "2"], DoRASpec(rank=2, alpha=3, method=method))
    for layer in adapted_layers(net).values():
        next(iter(layer.adapter_tensors().values())).data.add_(1)
    save_adapter(net, tmp_path, format="full" if method == "full" else "diffusers")
    inject(other, ["0", "2"], DoRASpec(rank=4, alpha=5, method=method))
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))
    assert all(
        (layer.adaptation.spec.rank, layer.adaptation.spec.alpha) == (4, 5) for layer in adapted_layers(other).values()
    )


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_another_method_is_refused(tmp_path, method):
    save_adapter(trained(), tmp_path, format="full")
    other = model()
    inject(other, ["0", "2"], DoRASpec(rank=4, method=method))
    needed = "magnitude" if method == "magnitude" else f"{method} of rank 4"
    with pytest.raises(ValueError, match=f"holds full for unet.0, but the model is adapted with {needed}:"):
        load_adapter(other, tmp_path)


def with_a_parameter(tmp_path):
    """The file of a net whose bias was trained too."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    inject(net, ["0"], DoRASpec(method="full"))
    return save_adapter(net, tmp_path, format="full", extra_parameters=["0.bias", "1.weight"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "has a header key dora_mm_parameters that is not valid JSON"),
        ("5", "has a header key dora_mm_parameters that is not a JSON list"),
        ('{"unet.0.bias": 1}', "has a header key dora_mm_parameters that is not a JSON list"),
        ("[5]", "is incomplete: 5, which its header lists"),
        ("[[]]", r"is incomplete: \[\], which its header lists"),
        ('["unet.0.bias", "unet.1.bias"]', "is incomplete: unet.1.bias, which its header lists"),
    ],
)
def test_a_damaged_list_of_parameters_is_refused(tmp_path, header, message):
    file = with_a_parameter(tmp_path)
    tensors, metadata = read_tensors(file)
    save_file(tensors, file, {**metadata, "dora_mm_parameters": header})
    with pytest.raises(ValueError, match=f"^{file} {message}"):
        load_adapter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path)


def test_parameters_of_a_model_that_is_not_given_are_refused(tmp_path):
    file = with_a_parameter(tmp_path)
    tensors, metadata = read_tensors(file)
    tensors["other.1.weight"] = tensors.pop("unet.1.weight")
    save_file(tensors, file, {**metadata, "dora_mm_parameters": '["unet.0.bias", "other.1.weight"]'})
    with pytest.raises(ValueError, match="also adapts other, but .* unet only"):
        load_adapter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path)


def test_what_does_not_fit(tmp_path):
    net = trained()
    with pytest.raises(ValueError, match="save it as format full"):
        save_adapter(net, tmp_path)
    save_adapter(net, tmp_path, format="full")
    with pytest.raises(ValueError, match="strength 1"):
        load_adapter(model(), tmp_path, strength=0.5)
    with pytest.raises(ValueError, match="trained_weights.safetensors does not fit this model"):
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
    with pytest.raises(ValueError, match="holds 1 weights, and its header says 2"):
        load_adapter(model(), tmp_path)
    save_file({"unet.0.weight": torch.ones(2)}, tmp_path / "trained_weights.safetensors")
    with pytest.raises(ValueError, match="its header does not have dora_mm_format"):
        load_adapter(model(), tmp_path)

"""Our own file: adapters of any method on any layer, full weights, and the files of before."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_mm import DoRASpec, inject, load_adapter, save_adapter, set_strength
from dora_mm.core import adapted_layers
from tests.shared import reference
from tests.shared.toy import read_tensors


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
    file = save_adapter(net, tmp_path, format="native", metadata={"steps": "10"})
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
    save_adapter(net, tmp_path, format="native")
    inject(other, ["0", "2"], DoRASpec(rank=4, alpha=5, method=method))
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))
    specs = [layer.adaptation.spec for layer in adapted_layers(other).values()]
    assert all((spec.rank, spec.alpha) == (4, 5) for spec in specs)


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_another_method_is_refused(tmp_path, method):
    save_adapter(trained(), tmp_path, format="native")
    other = model()
    inject(other, ["0", "2"], DoRASpec(rank=4, method=method))
    needed = "magnitude" if method == "magnitude" else f"{method} of rank 4"
    with pytest.raises(ValueError, match=f"holds full for model.0, but the model is adapted with {needed}:"):
        load_adapter(other, tmp_path)


def with_a_parameter(tmp_path):
    """The file of a net whose bias was trained too."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    inject(net, ["0"], DoRASpec(method="full"))
    return save_adapter(net, tmp_path, format="native", extra_parameters=["0.bias", "1.weight"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", ": its header key dora_mm_parameters is not valid JSON"),
        ("5", ": its header key dora_mm_parameters is not a JSON list"),
        ('{"model.0.bias": 1}', ": its header key dora_mm_parameters is not a JSON list"),
        ("[5]", " is incomplete: 5, which its header lists"),
        ("[[]]", r" is incomplete: \[\], which its header lists"),
        ('["model.0.bias", "model.1.bias"]', " is incomplete: model.1.bias, which its header lists"),
    ],
)
def test_a_damaged_list_of_parameters_is_refused(tmp_path, header, message):
    file = with_a_parameter(tmp_path)
    tensors, metadata = read_tensors(file)
    save_file(tensors, file, {**metadata, "dora_mm_parameters": header})
    with pytest.raises(ValueError, match=f"^{file}{message}"):
        load_adapter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path)


def test_parameters_of_a_model_that_is_not_given_are_refused(tmp_path):
    file = with_a_parameter(tmp_path)
    tensors, metadata = read_tensors(file)
    tensors["other.1.weight"] = tensors.pop("model.1.weight")
    save_file(tensors, file, {**metadata, "dora_mm_parameters": '["model.0.bias", "other.1.weight"]'})
    with pytest.raises(ValueError, match="also adapts other, but .* model only"):
        load_adapter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path)


def test_what_does_not_fit(tmp_path):
    net = trained()
    for format in ("diffusers", "peft"):
        with pytest.raises(ValueError, match="save it as format native"):
            save_adapter({"unet": net}, tmp_path, format=format)
    file = save_adapter(net, tmp_path, format="native")
    with pytest.raises(ValueError, match="strength 1"):
        load_adapter(model(), tmp_path, strength=0.5)
    with pytest.raises(ValueError, match="trained_weights.safetensors does not fit this model"):
        load_adapter(nn.Sequential(nn.Linear(4, 5)), tmp_path)
    half = model()
    with pytest.raises(ValueError, match="half precision"):
        load_adapter(half.half(), tmp_path)
    save_file({"unet.0.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="is a model, or a part of one, and no adapter"):
        load_adapter(model(), tmp_path)


class Everything(nn.Module):
    """A layer of each kind, those that no other format holds included."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.transposed = Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.transposed(self.words(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.norm(self.conv(x.mT).mT)


SPECS = {
    "words": DoRASpec(rank=2, alpha=3, method="lora"),
    "transposed": DoRASpec(rank=3, alpha=1, norm_grad="exact"),
    "q_proj": DoRASpec(rank=1, dropout=0.25),
    "out_proj": DoRASpec(method="magnitude"),
    "conv": DoRASpec(rank=2, alpha=5),
}


def every_method(trained: bool = True):
    torch.manual_seed(0)
    net = Everything().eval()
    if trained:
        for name, spec in SPECS.items():
            inject(net, [name], spec)
        for seed, layer in enumerate(adapted_layers(net).values()):
            reference.randomize(layer, seed=seed)
        nn.init.normal_(net.norm.bias)
    return net


def test_it_holds_adapters_of_every_method_on_every_layer(tmp_path):
    net, other, x = every_method(), every_method(trained=False), torch.arange(10).view(2, 5)
    save_adapter({"tower": net}, tmp_path, format="native", extra_parameters=["norm.bias"])
    assert load_adapter({"tower": other}, tmp_path).num_modules == 5
    load_adapter(other, tmp_path)  # the only component of the file, into layers that are adapted already
    torch.testing.assert_close(other(x), net(x))
    assert torch.equal(other.norm.bias, net.norm.bias)
    loaded, saved = adapted_layers(other), adapted_layers(net)
    assert loaded.keys() == saved.keys()
    for path, layer in loaded.items():
        assert layer.adaptation.spec == saved[path].adaptation.spec
        ours = layer.adapter_tensors()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in saved[path].adapter_tensors().items())


def test_the_strength_it_was_saved_at(tmp_path):
    net, other, x = every_method(), every_method(trained=False), torch.arange(10).view(2, 5)
    other.norm.bias = net.norm.bias
    save_adapter(net, tmp_path, format="native", strength=0.5)
    load_adapter(other, tmp_path)
    set_strength(net, 0.5)
    torch.testing.assert_close(other(x), net(x))


def test_a_fresh_adapter_is_a_fresh_one_at_every_strength(tmp_path):
    net, other = every_method(trained=False), every_method(trained=False)
    with torch.no_grad():
        net.conv.weight[3] = other.conv.weight[3] = 0
    for name in SPECS:
        inject(net, [name], DoRASpec(rank=2, alpha=3))
    save_adapter(net, tmp_path, format="native", strength=1.5)
    load_adapter(other, tmp_path)
    assert all(layer.is_fresh() for layer in adapted_layers(other).values())
    assert {layer.adaptation.spec.alpha for layer in adapted_layers(other).values()} == {3}
    x = torch.arange(10).view(2, 5)
    assert torch.equal(other(x), net(x))


def test_a_strength_that_leaves_nothing_of_the_base_in_a_row(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3))
    inject(net, ["0"], DoRASpec(rank=1))
    with torch.no_grad():
        net[0].magnitude /= 2
    with pytest.raises(ValueError, match="strength 2 .* no part of the base"):
        save_adapter(net, tmp_path, format="native", strength=2.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "tower.conv.lora_B"}, ": tower.conv: its low-rank tensor B is missing"),
        ({"add": "tower.odd"}, " also holds tower.odd, which belongs to no adapter"),
        ({"specs": "[]"}, ": its header key dora_mm_specs is not a JSON object"),
        ({"specs": '{"tower": 3}'}, ": its header key dora_mm_specs has no modules of tower"),
        ({"specs": '{"tower": {"conv": {"rank": 0}}}'}, ": its header key dora_mm_specs has no settings of"),
        ({"specs": '{"tower": {"conv": {"length": 0}}}'}, ": its header key dora_mm_specs has no settings of tower"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    file = save_adapter({"tower": every_method()}, tmp_path, format="native")
    tensors, header = read_tensors(file)
    tensors.pop(change.get("drop"), None)
    if "add" in change:
        tensors[change["add"]] = torch.ones(1)
    save_file(tensors, file, {**header, "dora_mm_specs": change.get("specs", header["dora_mm_specs"])})
    with pytest.raises(ValueError, match=f"^{file}{message}"):
        load_adapter({"tower": every_method(trained=False)}, tmp_path)

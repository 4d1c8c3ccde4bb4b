"""The public surface: what `dora_mm` resolves before it calls core and formats."""

import inspect
import re

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec, TargetMap


def model():
    return nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    "targets", [["to_q", "to_k"], TargetMap("mine", {"attn": ("to_q", "to_k")}), ["re:to_[qk]"], ("to_q", "to_k")]
)
def test_targets_are_a_map_or_patterns(targets):
    assert dora_mm.inject(model(), targets, DoRASpec(rank=2)).num_modules == 2


def test_parts_choose_from_a_map():
    mine = TargetMap("mine", {"q": ("to_q",), "k": ("to_k",)})
    assert [m.path for m in dora_mm.inject(model(), mine, DoRASpec(rank=2), parts=["k"]).modules] == ["to_k"]
    with pytest.raises(ValueError, match="^parts .* list of patterns"):
        dora_mm.inject(model(), ["to_q"], DoRASpec(), parts=["q"])


def test_seed():
    def drawn(seed):
        net = model()
        dora_mm.inject(net, ["to_q"], DoRASpec(rank=2), seed=seed)
        return dora_mm.adapter_parameters(net)["to_q.lora_A"]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends(backend):
    dora_mm.inject(model(), ["to_q"], DoRASpec(), backend=backend)
    with pytest.raises(ValueError, match="'cuda': use auto, torch, triton"):
        dora_mm.inject(model(), ["to_q"], DoRASpec(), backend="cuda")


def test_the_life_of_an_adapter(tmp_path):
    net = model()
    bare = {key: value.clone() for key, value in net.state_dict().items()}
    dora_mm.inject(net, ["to_q"], DoRASpec(rank=2, alpha=3))
    for parameter in dora_mm.adapter_parameters(net).values():
        parameter.data.add_(0.1)
    x = torch.randn(3, 4)
    trained = net["to_q"](x)
    dora_mm.save_adapter({"unet": net}, tmp_path)
    dora_mm.set_strength(net, 0.5)
    dora_mm.merge(net)
    dora_mm.unmerge(net)
    dora_mm.remove(net)
    assert all(torch.equal(value, bare[key]) for key, value in net.state_dict().items())
    dora_mm.load_adapter(net, tmp_path)
    with dora_mm.fixed_parameters(net):
        torch.testing.assert_close(net["to_q"](x), trained)


@pytest.mark.parametrize("name", dora_mm.__all__)
def test_public_names_document_their_parameters(name):
    """As an API generator reads them: a summary, and every parameter in Args (or Attributes, of a class)."""
    public = getattr(dora_mm, name)
    text = inspect.getdoc(public) or ""
    assert text.splitlines()[0].endswith(".")
    parameters = [p for p in inspect.signature(public).parameters if p not in ("self", "_")]
    section = "Attributes:" if inspect.isclass(public) else "Args:"
    documented = re.findall(r"^    (\w+): ", text.partition(section)[2], re.MULTILINE)
    assert [p for p in parameters if p not in documented] == []

"""Pre-Diag, diag(g) W0 + s B A, as a layer and in files. (test_forms.py has its values and gradients.)"""

import copy

import pytest
import torch
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.core import merge, set_strength, unmerge

LAYERS = {"linear": lambda: nn.Linear(7, 5), "conv": lambda: nn.Conv2d(4, 6, 3)}
INPUTS = {"linear": (3, 7), "conv": (2, 4, 5, 5)}


def adapted(name, *, trained=True):
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[name]())
    network = copy.deepcopy(base)
    inject(network, ["0"], DoRASpec(rank=2, alpha=3.0, method="pre_diag"), backend="torch")
    if trained:
        with torch.no_grad():
            network[0].lora_B.normal_()
            network[0].magnitude.add_(0.2 * torch.randn_like(network[0].magnitude))
    return base, network, torch.randn(INPUTS[name])


@pytest.mark.parametrize("name", LAYERS)
def test_a_fresh_one_changes_no_bit(name):
    base, network, x = adapted(name, trained=False)
    assert torch.equal(network[0].magnitude, torch.ones(len(base[0].weight)))
    assert torch.equal(network(x), base(x))


@pytest.mark.parametrize("name", LAYERS)
def test_strength_is_linear_and_merging_is_undone(name):
    base, network, x = adapted(name)
    full = network(x)
    set_strength(network, 0.25)
    torch.testing.assert_close(network(x), base(x) + 0.25 * (full - base(x)))
    set_strength(network, 1.0)
    merge(network, keep_base=True)
    torch.testing.assert_close(network(x), full)
    layer = network[0]
    unmerge(network)
    assert torch.equal(layer.weight, base[0].weight)


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("name", LAYERS)
def test_its_file_is_the_dora_that_computes_the_same(name, format, tmp_path):
    base, network, x = adapted(name)
    save_adapter({"model": network}, tmp_path, format=format)
    load_adapter({"model": base}, tmp_path, backend="torch")
    assert base[0].adaptation.spec.method == "dora"
    torch.testing.assert_close(base(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_gain_of_zero_has_no_file(tmp_path):
    _, network, _ = adapted("linear")
    network[0].magnitude.data[1] = 0
    with pytest.raises(ValueError, match="a gain of 0"):
        save_adapter({"model": network}, tmp_path, format="native")

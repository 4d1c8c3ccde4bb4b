"""Merging: how much rounding loses, and that unmerging restores every bit."""

import weakref

import pytest
import torch
from torch import nn

from dora_mm.core import DoRASpec, inject, merge, remove, unmerge
from dora_mm.core.functional import round_stochastically, seeded_generator
from tests.core import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge_restore_every_bit(dtype):
    model = nn.Sequential(nn.Linear(64, 48), nn.Conv1d(48, 8, 1)).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, ["0", "1"], DoRASpec(rank=4))
    for module in model:
        reference.randomize(module)
    x = torch.randn(300, 64).to(dtype)
    expected = model[0](x)
    report = merge(model)
    assert report.num_modules == 2
    assert abs(report.surviving_share - 1) < (1e-4 if dtype == torch.float32 else 0.02)
    assert reference.relative_error(model[0](x), expected) < 2 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="adapter of 0 is merged"):
        merge(model)
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert torch.equal(model[0](x), expected)


def test_merge_at_strength_0_is_the_base():
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    layer.set_strength(0.0)
    merge(layer)
    assert torch.equal(layer.weight, base.weight)
    unmerge(layer)
    assert torch.equal(layer.weight, base.weight)


def test_merge_without_keeping_the_base():
    base, layer = reference.linear(8, 6)
    reference.randomize(layer)
    weight = weakref.ref(layer.weight)
    expected = layer(torch.ones(8)).detach()
    merge(layer, keep_base=False)
    assert weight() is None  # its memory is free
    with pytest.raises(ValueError, match="keep_base=False"):
        unmerge(layer)
    remove(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(torch.ones(8)), expected)
    assert not torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("keep_base", [True, False])
def test_tied_weights_are_cloned_not_merged_twice(keep_base):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "one": nn.Linear(8, 10), "two": nn.Linear(8, 10)})
    for name in ("one", "two"):
        model[name].weight = model["embed"].weight
    tied = model["embed"].weight
    before = tied.detach().clone()
    inject(model, ["one", "two"], DoRASpec(rank=2))
    for seed, name in enumerate(("one", "two")):
        reference.randomize(model[name], seed=seed)
    x = torch.randn(3, 8)
    expected = [model[name](x) for name in ("one", "two")]
    merge(model, keep_base=keep_base)
    assert torch.equal(model["embed"].weight, before)
    for name, y in zip(("one", "two"), expected, strict=True):
        torch.testing.assert_close(model[name](x), y)
    if keep_base:
        unmerge(model)
        assert model["one"].weight is model["two"].weight is tied


def test_stochastic_rounding():
    generator = seeded_generator(0, "test")
    for dtype in (torch.bfloat16, torch.float16):
        exact = torch.randn(1000).to(dtype).float()
        assert torch.equal(round_stochastically(exact, dtype, generator).float(), exact)
        between = torch.full((100_000,), 1 + 0.3 * torch.finfo(dtype).eps)
        found = round_stochastically(between, dtype, generator).float()
        assert abs((found > 1).float().mean().item() - 0.3) < 0.01
        tiny = torch.full((100_000,), torch.finfo(dtype).tiny * torch.finfo(dtype).eps * 0.25)
        assert abs(round_stochastically(tiny, dtype, generator).double().mean() / tiny[0].double() - 1) < 0.05
    assert round_stochastically(torch.tensor([1e6]), torch.float16, generator).isfinite()


def test_merging_method_full_keeps_a_copy():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, ["0"], DoRASpec(method="full"))
    before = model[0].weight.detach().clone()
    merge(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    unmerge(model)
    assert torch.equal(model[0].weight, before)

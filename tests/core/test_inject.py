"""Adapters in a complete model."""

import pytest
import torch
from torch import nn

from dora_mm.core import (
    DoRASpec,
    TargetMap,
    adapter_parameters,
    fixed_parameters,
    inject,
    merge,
    remove,
    set_strength,
)
from tests.shared import reference


def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(1), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def test_report_and_parameters():
    net = model()
    net[3].requires_grad_(False)
    report = inject(net, ["0", "2"], DoRASpec(rank=4))
    assert (report.num_modules, report.num_parameters) == (2, 4 * 27 + 8 * 4 + 8 + 4 * 8 + 6 * 4 + 6)
    assert [m.path for m in report.modules] == ["0", "2"]
    assert "DoRAConv2d" in str(report)
    assert "202" not in str(report).splitlines()[0]
    *_, total, others = str(report).splitlines()
    assert total.split() == ["all", "2", f"{report.num_parameters:,}"]
    assert others.startswith(f"{report.num_trainable_others} other parameters still require gradients")
    names = adapter_parameters(net)
    assert list(names) == [f"{i}.{n}" for i in (0, 2) for n in ("lora_A", "lora_B", "magnitude")]
    assert sum(p.numel() for p in names.values()) == report.num_parameters


def test_the_table_has_no_part_where_patterns_were_given():
    net = model().requires_grad_(False)
    assert str(inject(net, ["0", "2"], DoRASpec(rank=4))).splitlines() == [
        "module  class       weight         count  parameters",
        "0       DoRAConv2d  8 x 3 x 3 x 3      1         148",
        "2       DoRALinear  6 x 8              1          62",
        "all                                    2         210",
    ]


def test_the_table_names_the_parts_of_a_map():
    report = inject(model().requires_grad_(False), TargetMap("toy", {"conv": ["0"], "mlp": ["2"]}), DoRASpec(rank=4))
    assert [line.split()[0] for line in str(report).splitlines()] == ["part", "conv", "mlp", "all"]


def test_only_adapted_weights_are_frozen_and_remove_restores_them():
    net = model()
    net[4].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    inject(net, ["2"], DoRASpec(rank=2))
    after = {name: p.requires_grad for name, p in net.named_parameters() if name in before}
    assert {name for name in before if before[name] != after[name]} == {"2.weight"}
    remove(net)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before


@pytest.mark.parametrize("concurrency", [False, True])
def test_tied_weights_are_trained_again_once_both_adapters_are_removed(concurrency):
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    for targets in [["a", "b"]] if concurrency else [["a"], ["b"]]:
        inject(net, targets, DoRASpec(rank=2))
    assert not net["a"].weight.requires_grad
    remove(net)
    assert net["a"].weight is net["b"].weight
    assert net["a"].weight.requires_grad


def test_a_shared_module_is_adapted_once_and_everywhere():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    assert inject(net, ["a"], DoRASpec(rank=2)).num_modules == 1
    assert net["b"]["c"] is net["a"]
    reference.randomize(net["a"])
    assert not torch.equal(net["b"]["c"](torch.ones(4)), nn.Linear.forward(net["a"], torch.ones(4)))


@pytest.mark.parametrize(
    ("net", "pattern", "spec", "words"),
    [
        (nn.ModuleDict({"x": nn.LayerNorm(4)}), "x", DoRASpec(), "x, a LayerNorm"),
        (nn.ModuleDict({"x": nn.Linear(4, 4).half()}), "x", DoRASpec(method="full"), "trains x .* half precision"),
    ],
)
def test_modules_that_cannot_be_adapted(net, pattern, spec, words):
    with pytest.raises(ValueError, match=words):
        inject(net, [pattern], spec)


def test_a_pattern_that_matches_nothing_is_named_without_a_map():
    with pytest.raises(ValueError, match=r"^pattern 'mdi' matches no module; nearest: mid$"):
        inject(nn.ModuleDict({"mid": nn.Linear(4, 4)}), ["mdi"], DoRASpec())


def test_nothing_is_changed_when_something_is_wrong():
    net = model()
    net[4].forward = lambda x: x
    with pytest.raises(ValueError, match="forward function of 4"):
        inject(net, ["2", "4"], DoRASpec())
    assert type(net[2]) is nn.Linear
    del net[4].forward
    inject(net, ["2"], DoRASpec())
    with pytest.raises(ValueError, match="^2 is adapted already"):
        inject(net, ["2"], DoRASpec())


def test_models_without_adapters():
    for call in (adapter_parameters, remove, merge, lambda net: set_strength(net, 0.5)):
        with pytest.raises(ValueError, match="no adapted layer"):
            call(model())
    with fixed_parameters(model()):
        pass


def test_training_lowers_the_loss_with_every_method():
    x, y = torch.randn(64, 3, 3, 3), torch.randn(64, 2)
    for method in ("dora", "lora", "magnitude", "full"):
        torch.manual_seed(0)
        net = model().requires_grad_(False)
        inject(net, ["0", "2", "4"], DoRASpec(rank=2, method=method))
        optimizer = torch.optim.SGD(adapter_parameters(net).values(), lr=0.1)
        losses = []
        for _ in range(20):
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("targets", [["one", "two"], ["one", "attn.q_proj", "attn.v_proj"]])
def test_an_injection_that_fails_half_way_is_undone(targets):
    net = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "attn": nn.MultiheadAttention(4, 2)})
    before = {path: (type(module), set(vars(module))) for path, module in net.named_modules()}
    trained = {name: p.requires_grad for name, p in net.named_parameters()}

    class NoMemory(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.linalg.vector_norm:
                NoMemory.calls += 1
                if NoMemory.calls == 2:
                    raise MemoryError
            return function(*args, **(kwargs or {}))

    with NoMemory(), pytest.raises(MemoryError):
        inject(net, targets, DoRASpec(rank=2))
    assert {path: (type(module), set(vars(module))) for path, module in net.named_modules()} == before
    assert {name: p.requires_grad for name, p in net.named_parameters()} == trained


def test_an_attribute_that_the_adapter_needs():
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].magnitude = 3.0
    with pytest.raises(ValueError, match="0 has an attribute magnitude"):
        inject(net, ["0"], DoRASpec(rank=2))


def test_a_block_that_is_the_model_itself():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

    targets = TargetMap("one", {"all": ["q"]}, {"Block": 1})
    assert inject(Block(), targets, DoRASpec(rank=2)).num_modules == 1

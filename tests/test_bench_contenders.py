"""What DoRA is measured against computes DoRA, and contenders share the weights of a model."""

import pytest
import torch
from torch import nn

from tests.benchmarks.contenders import CONTENDERS, DENSE, contending_layers, set_layers, target_paths, trained

DORA = {"PEFT DoRA": CONTENDERS["PEFT DoRA"], "our DoRA": CONTENDERS["our DoRA"]} | DENSE


def adapter(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A, B and m by what their names have in common."""
    found = {}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            found["m" if "magnitude" in name else "A" if "A" in name.replace("lora_", "") else "B"] = parameter
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_every_dora_computes_the_same(bias):
    base = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    x, dY = torch.randn(7, 12, requires_grad=True), torch.randn(7, 20)
    values = {"A": torch.randn(3, 12), "B": torch.randn(20, 3), "m": base.weight.norm(dim=1) * (1 + torch.rand(20))}
    results = {}
    for name, build in DORA.items():
        layer = build(base, 3)
        parameters = adapter(layer)
        assert {*parameters} == {*values}
        for key, value in values.items():
            parameters[key].data.copy_(value)
        y = layer(x)
        results[name] = [y, *torch.autograd.grad(y, [x, *(parameters[key] for key in "ABm")], dY)]
    expected = results.pop("our DoRA")
    for found in results.values():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", DENSE.values(), ids=DENSE)
def test_a_fresh_dense_layer_computes_what_the_base_does(build):
    base = nn.Linear(12, 20).requires_grad_(False)
    x = torch.randn(7, 12)
    torch.testing.assert_close(build(base, 3)(x), base(x))
    assert len(trained(build(base, 3))) == 3


def test_contenders_take_turns_on_the_same_weights():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    weights = [net[0].weight, net[2].weight]
    assert target_paths(net, ["0", "2"]) == ["0", "2"]
    layers = contending_layers(net, ["0", "2"], 2, DORA)
    assert type(net[0]) is nn.Linear
    x = torch.randn(5, 6)
    expected = net(x)
    for own in layers.values():
        set_layers(net, own)
        assert net[0] is own["0"]
        torch.testing.assert_close(net(x), expected)
        assert all(any(w is p for p in net.parameters()) for w in weights)

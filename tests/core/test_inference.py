"""Passes in eval mode without gradients: what they keep, when they compute it again, and how exact they are."""

import copy

import pytest
import torch
from torch import nn

from dora_mm.core import DoRASpec, adapt_layer, inject
from dora_mm.core.wrappers.float8 import Float8Linear
from tests.core.test_layer import CONVS, conv_input
from tests.core.test_work_once import CHANGES, check_output
from tests.shared import reference

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
WRITES = (".data", "average", "base")  # to `.data`, which no version counts


def trained_layer():
    return reference.randomize(reference.linear(32, 24)[1]).eval()


@torch.no_grad()
def infer(layer, x):
    return layer(x)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_norms_are_computed_once(inference_mode):
    layer, x, counts = trained_layer(), torch.randn(5, 32), []
    with torch.inference_mode(inference_mode), torch.no_grad():
        for _ in range(3):
            with reference.NewTensors() as allocated:
                layer(x)
            counts.append(allocated.shapes.count((4, 4)))  # A A^T
    assert counts == [1, 0, 0]


def test_no_weight_is_kept():
    """With many tokens W(t) is built, and goes after the pass: a model in eval mode takes no more memory."""
    layer, x = trained_layer(), torch.randn(3000, 32)
    with reference.NewTensors() as allocated:
        for _ in range(2):
            infer(layer, x)
    assert allocated.shapes.count((24, 32)) >= 2
    assert allocated.num_alive((24, 32)) == 0


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [3, 3000])  # either form
def test_a_change_between_passes_has_an_effect(change, tokens):
    """Also one that is written to `.data`, once a pass of training has been made."""
    layer, x = trained_layer(), torch.randn(tokens, 32)
    infer(layer, x)
    CHANGES[change](layer)
    if change in WRITES:
        layer.train()(x)
        layer.eval()
    x = x.to(layer.weight.dtype)
    check_output(infer(layer, x), layer, x)


@pytest.mark.parametrize("change", ["stack", "bias", "weight", "parameter"])
def test_other_changes_have_an_effect(change):
    layer, x = trained_layer(), torch.randn(3, 32)
    infer(layer, x)
    if change == "stack":
        layer.stack("x", layer.adaptation.spec, layer.adapter_tensors(), 0.5)
    elif change in ("bias", "weight"):
        with torch.no_grad():
            getattr(layer, change).add_(1)
    else:
        layer.magnitude = nn.Parameter(layer.magnitude.detach() * 2)
    assert torch.equal(infer(layer, x), infer(copy.deepcopy(layer), x))
    if change != "stack":
        check_output(infer(layer, x), layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("name", ["linear", "plain", "groups", "1d", "embedding"])
def test_outputs(name, method, dtype):
    """As exact as those of training, with one adapter and with two, at several strengths, autocast or not."""
    torch.manual_seed(0)
    base = {"linear": nn.Linear(40, 48), "embedding": nn.Embedding(40, 48), **CONVS}[name].to(dtype)
    layer = reference.randomize(adapt_layer(copy.deepcopy(base), DoRASpec(rank=4, method=method), path="layer"))
    wide = {"linear": torch.randn(700, 40), "embedding": torch.randint(0, 40, (9, 5))}
    for strengths in ((1.0,), (0.5, -2.0)):
        if len(strengths) == 2:
            layer.stack("x", layer.adaptation.spec, layer.adapter_tensors(), strengths[1])
            layer.adaptation.strength = strengths[0]
        x = wide.get(name)
        x = conv_input(base) if x is None else x
        for given in (x[:1], x):
            given = given if name == "embedding" else given.to(dtype)
            exact = copy.deepcopy(layer).double()
            right = infer(exact.train(), given if name == "embedding" else given.double())
            for autocast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    own, found = infer(layer.train(), given), infer(layer.eval(), given)
                assert found.dtype == own.dtype
                assert found.shape == own.shape
                bound = 2 * reference.relative_error(own, right) + UNIT[found.dtype]
                assert reference.relative_error(found, right) <= bound


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_after_a_pass_of_inference_has_an_effect(how):
    """torch's fused optimizers change no version."""
    layer, x = trained_layer(), torch.randn(3, 32)
    optimizer = torch.optim.AdamW(layer.adapter_tensors().values(), lr=0.1, **how)
    layer(x).square().sum().backward()
    before = infer(layer, x)
    optimizer.step()
    assert reference.relative_error(infer(layer, x), before) > 1e-2
    check_output(infer(layer, x), layer, x)


def test_parameters_that_were_made_in_inference_mode():
    with torch.inference_mode():
        layer = trained_layer()
        x = torch.randn(3, 32)
        layer(x)
        layer.lora_B.mul_(2)
        check_output(layer(x), layer, x)


def test_a_copy_keeps_nothing_of_the_original():
    layer, x = trained_layer(), torch.randn(3, 32)
    infer(layer, x)
    twin = copy.deepcopy(layer)
    assert twin.adaptation.kept is None
    CHANGES[".data"](twin)
    check_output(infer(twin, x), twin, x)


@pytest.mark.parametrize("replace", ["data", "parameter"])
def test_memory_that_is_taken_again_is_no_sign_of_the_same_numbers(replace):
    """An allocator gives what was freed to the next tensor of that size."""
    layer, x = trained_layer(), torch.randn(3, 32)
    for _ in range(6):
        drawn = torch.randn_like(layer.lora_B)
        if replace == "data":
            layer.lora_B.data = drawn
        else:
            del layer.lora_B
            layer.lora_B = nn.Parameter(drawn)
        del drawn
        check_output(infer(layer, x), layer, x)


def test_passes_in_other_dtypes_share_nothing():
    """A weight in float8 multiplies in the dtype of its input."""
    base = nn.Linear(32, 24)
    nn.init.constant_(base.bias, 100.1)
    model = nn.Sequential(Float8Linear.of(base)).requires_grad_(False)
    layer = reference.randomize(inject(model, ["0"], DoRASpec(4)) and model[0]).eval()
    x = torch.randn(3, 32)
    alone = infer(copy.deepcopy(layer), x)
    infer(layer, x.bfloat16())
    assert torch.equal(infer(layer, x), alone)

"""What happens between forward and backward: outputs overwritten in place, checkpoints, hooks on saved tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_mm import DoRASpec, adapter_parameters, inject
from tests.shared import reference

TOKENS = [2, 3000]  # either form
METHODS = ["dora", "exact", "lora", "magnitude"]


def adapted(layer, method="dora"):
    model = nn.Sequential(layer)
    norm_grad = "exact" if method == "exact" else "detached"
    inject(model, ["0"], DoRASpec(rank=4, method=method.replace("exact", "dora"), norm_grad=norm_grad))
    reference.randomize(model[0])
    return model


def linear(method="dora"):
    return adapted(nn.Linear(32, 24), method)


def gradients(model, function, x):
    """Of the input and the adapter, after `function(model, x)`."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    function(model, x).square().sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in adapter_parameters(model).items()}}


def check_same_gradients(model, in_place, out_of_place, x):
    exact = gradients(reference.doubled(model), out_of_place, x.double())
    reference.check_errors(gradients(model, in_place, x), gradients(model, out_of_place, x), exact)


def with_checkpoint(function, use_reentrant):
    return lambda model, x: checkpoint(lambda t: function(model, t), x, use_reentrant=use_reentrant)


OPERATIONS = {
    "mul_": (lambda y: y.mul_(2), lambda y: y * 2),
    "relu_": (lambda y: y.relu_(), lambda y: y.relu()),
    "add_": (lambda y: y.add_(y.detach()), lambda y: y + y.detach()),
    "a part": (lambda y: y[..., 0].zero_() is None or y, lambda y: torch.cat([0 * y[..., :1], y[..., 1:]], -1)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_output_may_be_overwritten(method, tokens, name):
    in_place, out_of_place = OPERATIONS[name]
    x = torch.randn(tokens, 32)
    check_same_gradients(linear(method), lambda m, t: in_place(m(t)), lambda m, t: out_of_place(m(t)), x)


@pytest.mark.parametrize("method", METHODS)
def test_a_relu_in_place_after_a_convolution(method):
    model, x = adapted(nn.Conv2d(3, 8, 3, padding=1), method), torch.randn(2, 3, 9, 9)
    check_same_gradients(model, lambda m, t: nn.ReLU(inplace=True)(m(t)), lambda m, t: nn.ReLU()(m(t)), x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_output_may_be_overwritten_inside_a_checkpoint(use_reentrant, tokens):
    in_place = with_checkpoint(lambda m, t: m(t).relu_(), use_reentrant)
    check_same_gradients(linear(), in_place, lambda m, t: m(t).relu(), torch.randn(tokens, 32))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_output_of_a_checkpoint_may_be_overwritten(use_reentrant, tokens):
    run = with_checkpoint(lambda m, t: m(t), use_reentrant)
    check_same_gradients(linear(), lambda m, t: run(m, t).mul_(2), lambda m, t: m(t) * 2, torch.randn(tokens, 32))


# --- nothing is kept but through torch's own list of saved tensors ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_checkpoint_keeps_no_output(use_reentrant, tokens):
    model, x = nn.Sequential(*linear(), nn.Tanh()), torch.randn(tokens, 32, requires_grad=True)
    with reference.NewTensors() as allocated:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    assert allocated.num_alive((tokens, 24)) == 1  # y
    y.sum().backward()


@pytest.mark.parametrize("tokens", TOKENS)
def test_hooks_on_saved_tensors_see_every_tensor_of_token_size(tokens):
    """Such as torch.autograd.graph.save_on_cpu: what they move away must not stay in memory."""
    model, x = linear(), torch.randn(tokens, 32, requires_grad=True)

    def elsewhere(t):
        return t.shape, t.detach().flatten().clone()

    with (
        reference.NewTensors() as allocated,
        torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda kept: kept[1].view(kept[0])),
    ):
        y = model(x)
    assert allocated.num_alive((tokens, 24)) == 1  # y
    y.sum().backward()

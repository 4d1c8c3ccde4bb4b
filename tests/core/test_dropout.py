"""Dropout: one mask on x, in the update only, against autograd of the formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_mm.core import DoRASpec, adapt_layer
from dora_mm.core.forms import adapted_product
from dora_mm.core.kinds import restore_layer
from dora_mm.core.passes import Options
from tests.shared import reference
from tests.shared.reference import make


def test_dropout_is_for_training_only():
    base, layer = reference.linear(32, 24, dropout=0.5)
    reference.randomize(layer)
    x = torch.randn(50, 32)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    restore_layer(layer)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_dropout_of_a_convolution(dtype, method):
    base = nn.Conv2d(18, 12, 3, groups=2).to(dtype)
    layer = reference.randomize(adapt_layer(copy.deepcopy(base), DoRASpec(rank=2, dropout=0.3, method=method)))
    x = torch.randn(2, 18, 7, 7).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.3)
    W0, (adapter,), doubled = base.weight, layer.adapters(), reference.doubled(base)
    update, rounded = (reference.merged_weight(W0, adapter, to) - W0.to(to) for to in (torch.float64, torch.float32))
    expected = doubled(x.double()) + doubled._conv_forward(dropped.double(), update, None)
    usual = base(x) + base._conv_forward(dropped, rounded.to(dtype), None)
    reference.check_error(y, usual, expected)
    wanted = [x, *layer.adapter_tensors().values()]
    gradients = [torch.autograd.grad(of.float().sum(), wanted, retain_graph=True) for of in (y, usual, expected)]
    reference.check_errors(*map(reference.numbered, gradients), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "keep_weight"), [("dora", True), ("dora", False), ("lora", True)])
@pytest.mark.parametrize("tokens", [(64,), (2, 40)])
def test_dropout_does_not_affect_the_base(dtype, method, keep_weight, tokens):
    """One mask on x, in the update only, rounded once: x W0' + drop(x) (W' - W0)' + b."""
    W0, adapter = make(48, 32, 4, dtype=torch.float32)
    if method == "lora":
        adapter = adapter._replace(magnitude=None)
    W0, x, bias = W0.to(dtype), torch.randn(*tokens, 32).to(dtype).requires_grad_(), torch.randn(48).to(dtype)
    torch.manual_seed(5)
    y = adapted_product(x, W0, bias, [adapter], Options(dropout=0.4, keep_weight=keep_weight))
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    update, rounded = (reference.merged_weight(W0, adapter, to) - W0.to(to) for to in (torch.float64, torch.float32))
    expected = x.double() @ W0.double().T + dropped.double() @ update.T + bias.double()
    usual = F.linear(x, W0, bias) + F.linear(dropped, rounded.to(dtype))
    assert y.dtype == dtype
    reference.check_error(y, usual, expected)
    wanted = [adapter.A, adapter.B, x]  # with one graph of what dropout leaves
    gradients = [torch.autograd.grad(of.float().sum(), wanted, retain_graph=True) for of in (y, usual, expected)]
    reference.check_errors(*map(reference.numbered, gradients), dtype=dtype)


def test_dropout_without_a_magnitude_never_builds_the_update():
    """LoRA's published config: no tensor of the weight's size is allocated, forward and backward.

    In float32: in half precision it depends on the products of the processor. Its results are tested above.
    """
    W0, adapter = make(48, 32, 4, dtype=torch.float32, size=0.01)
    x = torch.randn(64, 32).requires_grad_()
    with reference.NewTensors() as allocated:
        y = adapted_product(x, W0, None, [adapter._replace(magnitude=None)], Options(dropout=0.4))
        y.sum().backward()
    assert x.grad.isfinite().all()
    assert (64, 48) in allocated.shapes
    assert (48, 32) not in allocated.shapes


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_dropout_of_an_input_that_is_not_contiguous(method):
    """What a (batch, length, features) attention gives its projections."""
    _, layer = reference.linear(16, 8, method=method, dropout=0.5)
    reference.randomize(layer)
    x, dY = torch.randn(4, 3, 16), torch.randn(4, 3, 8)

    def dX(x):
        torch.manual_seed(1)
        x = x.requires_grad_()
        mask = F.dropout(torch.ones(4, 3, 16), 0.5)
        with pytest.MonkeyPatch.context() as patch:  # the same mask for every layout
            patch.setattr(F, "dropout", lambda t, p: t * mask)
            return torch.autograd.grad(layer(x), x, dY)[0]

    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(transposed, x)
    torch.testing.assert_close(dX(transposed), dX(x))

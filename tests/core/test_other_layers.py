"""Embeddings and GPT-2's Conv1D, which store their weight with the output last."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_mm.core import DoRASpec, adapt_layer, fixed_parameters, inject, merge, remove, unmerge
from tests.shared import reference

LAYERS = {
    "embedding": lambda: nn.Embedding(20, 12),
    "padded embedding": lambda: nn.Embedding(20, 12, padding_idx=3),
    "Conv1D": lambda: Conv1D(12, 20),
}


def example(name, dtype=torch.float32):
    if "embedding" in name:
        return torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    return torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(0)).to(dtype)


def build(name, dtype=torch.float32, **spec):
    torch.manual_seed(1)
    base = LAYERS[name]().to(dtype)
    return base, adapt_layer(copy.deepcopy(base), DoRASpec(**{"rank": 3, "alpha": 7.0, **spec}), path="layer")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_fresh_layer_changes_no_bit(name, dtype, autocast):
    base, layer = build(name, dtype)
    x = example(name, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = base(x)
        for found in (layer(x), fixed(layer, x)):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def fixed(layer, x):
    with fixed_parameters(layer):
        return layer(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_value_and_gradients(name, method, norm_grad):
    base, layer = build(name, torch.float64, method=method, norm_grad=norm_grad)
    reference.randomize(layer)
    x = example(name, torch.float64)
    trained = list(layer.adapter_tensors().values())
    W = reference.merged_weight(layer.matrix, layer.adapters()[0])
    right = W.T[x] if "embedding" in name else x @ W.T + base.bias
    y = layer(x)
    torch.testing.assert_close(y, right)
    dY = torch.randn_like(y)
    if name == "padded embedding":
        dY[x == 3] = 0  # the gradient of the base excludes this row
    for a, b in zip(torch.autograd.grad(y, trained, dY), torch.autograd.grad(right, trained, dY), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_the_padding_of_A_is_not_trained(name):
    _, layer = build(name)
    reference.randomize(layer)
    x = example(name)
    layer(x).sum().backward()
    trained = layer.lora_A.grad.abs().sum(0) > 0
    assert trained[3] == (name != "padded embedding")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_strength_and_copies(name, dtype):
    base, layer = build(name, dtype)
    reference.randomize(layer)
    x = example(name, dtype)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    merge(layer)
    assert layer.weight.shape == base.weight.shape
    assert layer.weight.is_contiguous()
    # each weight is rounded up or down, by at most a unit in the last place; in float32 two orders of summation meet
    assert reference.relative_error(layer(x), expected) < 4 * torch.finfo(dtype).eps
    unmerge(layer)
    assert torch.equal(layer(x), expected)
    layer.set_strength(0)
    assert torch.equal(layer(x), base(x))
    remove(layer)
    assert type(layer) is type(base)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_frequent_token_in_half_precision(dtype):
    """Its sum has 4,000 terms: added up in bf16 it would stop growing after 256 equal ones."""
    _, layer = build("embedding", dtype, method="lora")
    reference.randomize(layer)
    x, dY = torch.zeros(4000, dtype=torch.long), torch.ones(4000, 12, dtype=dtype)
    (found,) = torch.autograd.grad(layer(x), layer.lora_A, dY)
    expected = 4000 * layer.adaptation.spec.scaling * layer.lora_B.double().sum(0)
    # B and its product with dY are rounded to the dtype, in all 4,000 terms alike, which do not average out
    assert reference.relative_error(found[:, 0], expected) < 4 * torch.finfo(dtype).eps


def test_embeddings_that_cannot_be_adapted():
    for layer, spec, reason in (
        (nn.Embedding(5, 4), DoRASpec(2, dropout=0.1), "0 is an Embedding.*dropout"),
        (nn.Embedding(5, 4, max_norm=1.0), DoRASpec(2), "0 has max_norm 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            inject(nn.Sequential(layer), ["0"], spec)

"""Adapters on quantised layers: as on a dense layer with the dequantised weight, and nothing dense is kept."""

import copy

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from dora_mm import load_adapter, save_adapter
from dora_mm.core import DoRASpec, fixed_parameters, inject, merge, remove, set_strength
from dora_mm.core.wrappers.float8 import Float8Linear
from tests.shared import reference
from tests.shared.quantized import fp8, int8, nf4, torchao_int8

SIZE = (48, 64)


KINDS = {"nf4": nf4, "int8": int8, "torchao int8": torchao_int8, "float8": Float8Linear.of}


@pytest.fixture(params=KINDS)
def bases(request):
    """A quantised layer, and a dense one with the weight that the first dequantises to."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    quantized = KINDS[request.param](base).requires_grad_(False)
    from dora_mm.core.wrappers.quantized import dequantized

    dense = nn.Linear(64, 48).requires_grad_(False)
    dense.weight.data, dense.bias.data = dequantized(quantized).float(), base.bias.data
    assert reference.relative_error(dense.weight, base.weight.double()) < 0.15
    return quantized, dense


def adapted(base, **spec):
    net = nn.Sequential(base)
    inject(net, ["0"], DoRASpec(**{"rank": 3, "alpha": 5.0, **spec}))
    return net


@pytest.mark.parametrize("spec", [{}, {"norm_grad": "exact"}, {"method": "lora"}, {"method": "magnitude"}])
@pytest.mark.parametrize("tokens", [5, 500])
def test_value_and_gradients_are_those_of_the_dense_layer(bases, spec, tokens):
    ours, right = (adapted(base, **spec) for base in bases)
    for net in (ours, right):
        reference.randomize(net[0])
    x, dY = torch.randn(tokens, 64), torch.randn(tokens, 48)
    results = []
    for net, dtype in ((ours, x.dtype), (right, x.dtype), (reference.doubled(right), torch.float64)):
        given = x.to(dtype, copy=True).requires_grad_()
        y = net(given)
        y.backward(dY.to(dtype))
        results.append([y, given.grad, *(p.grad for p in net[0].adapter_tensors().values())])
    reference.check_errors(*map(reference.numbered, results))
    with fixed_parameters(ours), torch.no_grad():
        torch.testing.assert_close(ours(x), results[1][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after_a_pass", [False, True])
def test_any_dtype_before_and_after_a_pass_of_the_base(kind, stored, given, after_a_pass):
    torch.manual_seed(0)
    base = nn.Linear(64, 48).to(stored)
    layer = KINDS[kind](base).requires_grad_(False)
    x = torch.randn(5, 64).to(given)
    if after_a_pass:
        try:
            layer(x)
        except RuntimeError:
            pytest.skip("the base itself does not take this input")
    net = adapted(layer)
    reference.randomize(net[0])
    W = reference.merged_weight(net[0].matrix, net[0].adapters()[0])
    right = x.double() @ W.T + net[0].bias.double()
    x.requires_grad_()
    y = net(x)
    assert y.dtype == given
    # kernels of other packages: how often they round is not ours to compute
    assert reference.relative_error(y, right) < 8 * torch.finfo(min(given, stored, key=lambda d: d.itemsize)).eps
    y.float().sum().backward()
    assert x.grad.dtype == given
    if after_a_pass:
        set_strength(net, 0)
        net(x)
        set_strength(net, 1)
        assert reference.relative_error(net(x), right) < 0.02


def test_copies(bases):
    net = adapted(bases[0])
    reference.randomize(net[0])
    x = torch.randn(5, 64)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_saved_and_loaded(bases, tmp_path):
    twin = copy.deepcopy(bases[0])
    net = adapted(bases[0])
    reference.randomize(net[0])
    save_adapter({"unet": net}, tmp_path)
    other = nn.Sequential(twin)
    load_adapter({"unet": other}, tmp_path)
    x = torch.randn(5, 64)
    assert torch.equal(other(x), net(x))
    load_adapter({"unet": other}, tmp_path)


def test_no_dense_weight_is_kept(bases):
    net = adapted(bases[0])
    reference.randomize(net[0])
    x = torch.randn(500, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = net(x)
    assert not any(t.shape == SIZE and t.is_floating_point() for t in kept)
    y.sum().backward()


def test_strength_0_is_the_base_layer_itself(bases):
    base = copy.deepcopy(bases[0])
    net = adapted(bases[0])
    reference.randomize(net[0])
    set_strength(net, 0)
    x = torch.randn(5, 64)
    assert torch.equal(net(x), base(x))
    remove(net)
    assert type(net[0]) is type(base)
    assert torch.equal(net(x), base(x))


def test_what_is_refused(bases):
    net = adapted(bases[0])
    with pytest.raises(ValueError, match="^0 is quantised, and merging"):
        merge(net)
    remove(net)
    with pytest.raises(ValueError, match="^0 is quantised, and method full"):
        adapted(net[0], method="full")


def test_layers_that_are_not_quantised_yet():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="^0 is not quantised yet"):
        adapted(bitsandbytes.nn.Linear4bit(64, 48))


def test_other_kinds_of_weights_are_refused():
    class Strange(torch.Tensor): ...

    base = nn.Linear(64, 48)
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Strange))
    with pytest.raises(ValueError, match="matches 0, a Linear, which cannot be adapted"):
        adapted(base)


def test_a_4_bit_layer_that_was_evaluated_is_adapted_as_before():
    """bitsandbytes repacks such weights where a CPU has bf16 products (on others, this cannot fail)."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4", compress_statistics=False).to("cpu")
    net, x = nn.Sequential(layer).requires_grad_(False).eval(), torch.randn(5, 64)
    net.train()
    right = adapted(copy.deepcopy(net)[0])
    net.eval()
    with torch.no_grad():
        net(x)
        found = adapted(net[0])
        for model in (found, right):
            model.eval()
            reference.randomize(model[0])
            set_strength(model, 0.0)
            model(x)
            set_strength(model, 1.0)
        assert reference.relative_error(found(x), right(x).double()) < 0.01  # its scales were rounded to bf16


def test_float8_is_as_close_as_its_mantissa_and_keeps_the_largest_of_each_row_and_rows_of_zeros():
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    base.weight.data *= torch.logspace(-6, 6, 48)[:, None]
    base.weight.data[3] = 0
    layer = Float8Linear.of(base)
    W, found = base.weight.detach(), layer.dense()
    assert not found[3].any()
    largest = W.abs().argmax(dim=1, keepdim=True)
    kept, given = found.gather(1, largest), W.gather(1, largest)
    unit = torch.finfo(W.dtype).eps / 2
    assert ((kept - given).abs() <= 3 * unit * given.abs()).all()  # divided by a scale, and multiplied again
    large = W.abs() > W.abs().amax(dim=1, keepdim=True) / 2**14  # above the numbers without a leading one
    assert ((found - W).abs() <= W.abs() / 16 * (1 + 1e-6))[large].all()
    assert layer.weight.element_size() == 1


def test_a_fresh_adapter_changes_float8_by_rounding_alone():
    torch.manual_seed(0)
    layer = Float8Linear.of(nn.Linear(64, 48))
    x = torch.randn(5, 64)
    before, exact = layer(x), x.double() @ layer.dense().double().T + layer.bias.double()
    net = adapted(layer)
    reference.check_error(net(x), before, exact)
    set_strength(net, 0)
    assert net(x).equal(before)


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_fp8_of_transformers(scales):
    """Weights in float8 with a scale for each block, which transformers itself quantises and dequantises."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 48).requires_grad_(False)
    layer = fp8(dense, scales)
    theirs = _dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, layer.block_size, torch.float32)
    assert reference.relative_error(theirs, dense.weight) < 0.05
    dense.weight.data = theirs
    ours, right = adapted(layer), adapted(dense)
    assert torch.equal(ours[0].matrix, theirs)
    for net in (ours, right):
        reference.randomize(net[0])
    x = torch.randn(7, 64)
    results = []
    for net in (ours, right):
        y = net(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(net[0].adapter_tensors().values()))])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)
    with pytest.raises(ValueError, match="is quantised, and merging would lose the update"):
        merge(ours)

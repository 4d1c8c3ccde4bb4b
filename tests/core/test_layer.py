"""The layer: an exact start, strength, casting, loading, copying."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dora_mm.core import DoRASpec, adapt_layer, adapter_parameters, fixed_parameters
from dora_mm.core.functional import merged_weight
from dora_mm.core.kinds import restore_layer
from dora_mm.core.ops import ConvOp
from tests.shared import reference

SIZES = [(48, 36, 5), (48, 36, 1000), (333, 77, 19), (640, 640, 2048), (1280, 1280, 64)]  # out, in, tokens
CONVS = {
    "plain": nn.Conv2d(18, 12, 3, padding=1),
    "stride": nn.Conv2d(18, 12, 3, stride=2, padding=1),
    "dilation": nn.Conv2d(18, 12, 3, dilation=2, padding="same"),
    "groups": nn.Conv2d(18, 12, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(18, 18, 3, groups=18),
    "reflect": nn.Conv2d(18, 12, 3, padding=1, padding_mode="reflect"),
    "pointwise": nn.Conv2d(18, 12, 1),
    "1d": nn.Conv1d(18, 12, 5, stride=2),
    "wide padding": nn.Conv2d(18, 12, 2, padding=1),
    "3d": nn.Conv3d(18, 12, (1, 3, 3), padding=(0, 1, 1)),
}


def conv_input(conv, size=7):
    return torch.randn(2, conv.in_channels, *(size,) * (conv.weight.dim() - 2))


def run(layer, x, autocast):
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return layer(x)


# --- the start ---


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_fresh_linear_changes_no_bit(method, dtype, autocast):
    for out, inner, tokens in SIZES if method == "dora" else SIZES[:2]:
        base, layer = reference.linear(inner, out, dtype=dtype, method=method)
        x = torch.randn(tokens, inner).to(dtype)
        expected = run(base, x, autocast)
        for found in run(layer, x, autocast), run(layer.eval(), x, autocast), run(layer, x, autocast):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (out, inner, tokens)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_fresh_convolution_changes_no_bit(name, dtype, autocast):
    base = copy.deepcopy(CONVS[name]).to(dtype)
    x = conv_input(base).to(dtype)
    for method in ("dora", "lora"):
        layer = adapt_layer(copy.deepcopy(base), DoRASpec(rank=2, method=method))
        assert torch.equal(run(layer, x, autocast), run(base, x, autocast))
        assert torch.equal(run(layer.eval(), x, autocast), run(base, x, autocast))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_fresh_layer_changes_no_bit_in_other_memory_layouts(layout):
    if layout == "channels_last":
        base = nn.Conv2d(16, 24, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    else:
        base = nn.Linear(96, 80)
        base.weight.data = torch.randn(96, 80).T
        x = torch.randn(50, 96)
    expected = run(base, x, None)
    layer = adapt_layer(base, DoRASpec(rank=2))
    assert torch.equal(run(layer, x, None), expected)
    assert merged_weight(layer.weight, layer.adapters()).stride() == base.weight.stride()


def test_fresh_layer_stays_exact_when_cast():
    """The norms of rounded weights differ from those of the fp32 ones: m follows as long as nothing is trained."""
    base, layer = reference.linear(64, 48)
    for dtype in (torch.bfloat16, torch.float64):
        base, layer = base.to(dtype), layer.to(dtype)
        x = torch.randn(7, 64).to(dtype)
        assert torch.equal(run(layer, x, None), run(base, x, None))


def test_drawing_depends_only_on_seed_and_path():
    def drawn(path, seed, first=None):
        if first:
            adapt_layer(nn.Linear(8, 8), DoRASpec(), path=first, seed=seed)
        return adapt_layer(nn.Linear(8, 8), DoRASpec(), path=path, seed=seed).lora_A

    assert torch.equal(drawn("a", 0), drawn("a", 0, first="b"))
    assert not torch.equal(drawn("a", 0), drawn("b", 0))
    assert not torch.equal(drawn("a", 0), drawn("a", 1))


def test_drawing_is_kaiming_uniform():
    A = adapt_layer(nn.Linear(400, 8), DoRASpec(rank=64)).lora_A
    assert A.abs().max() <= 0.05
    assert abs(A.std().item() - 0.05 / 3**0.5) < 1e-3  # 25,600 numbers: 12 standard deviations


# --- trained values ---


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trained_convolution(name, method, dtype):
    base = copy.deepcopy(CONVS[name]).to(dtype)
    layer = adapt_layer(copy.deepcopy(base), DoRASpec(rank=2, alpha=6, method=method, norm_grad="exact"))
    reference.randomize(layer)
    x = conv_input(base).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    W = reference.merged_weight(base.weight, layer.adapters()[0])
    exact_x = x.detach().double().requires_grad_()
    exact_base = copy.deepcopy(base).double()
    expected = exact_base._conv_forward(exact_x, W, exact_base.bias)
    single = reference.merged_weight(base.weight, layer.adapters()[0], torch.promote_types(dtype, torch.float32))
    usual = base._conv_forward(x, single.to(dtype), base.bias)
    reference.check_error(y, usual, expected)
    trained = list(layer.adapter_tensors().values())
    dY = torch.randn(y.shape).to(dtype)
    outputs = (y, x), (usual, x), (expected, exact_x)
    gradients = [torch.autograd.grad(of, [by, *trained], dY.to(of)) for of, by in outputs]
    reference.check_errors(*map(reference.numbered, gradients), dtype=dtype)


def test_inputs_of_a_convolution_without_groups_are_concatenated_in_their_memory_layout():
    """Otherwise the product would transpose them first."""
    op, x = ConvOp((1, 1), (1, 1), (1, 1)), torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 16, 3, 3).to(memory_format=torch.channels_last)
    joined = op.join(x, weight, torch.randn(2, 2, 9, 9), torch.randn(24, 2))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (op.concatenate(x, x), *joined))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_unbatched_convolution_in_half_precision(groups, method):
    base = nn.Conv2d(18, 12, 3, groups=groups).to(torch.bfloat16)
    layer = reference.randomize(adapt_layer(base, DoRASpec(rank=2, method=method)))
    x = torch.randn(2, 18, 7, 7).to(torch.bfloat16)
    assert torch.equal(layer(x[0]), layer(x)[0])


def test_bias_is_never_scaled():
    _, layer = reference.linear(8, 6)
    with torch.no_grad():
        layer.magnitude.zero_()
        layer.bias.fill_(3)
    assert torch.equal(layer(torch.randn(4, 8)), torch.full((4, 6), 3.0))


def test_trained_bias_gets_its_gradient():
    for dtype in (torch.float32, torch.bfloat16):
        _, layer = reference.linear(8, 6, dtype=dtype)
        reference.randomize(layer)(torch.randn(4, 8).to(dtype)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((6,), 4.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strength_is_linear(dtype):
    base, layer = reference.linear(64, 48, dtype=dtype)
    reference.randomize(layer)
    x = torch.randn(30, 64).to(dtype)
    adapter, single = layer.adapters()[0], torch.promote_types(dtype, torch.float32)
    for strength in (1e-5, 0.3, 1.0, -1.0, -1e-5):
        layer.set_strength(strength)
        weights = (
            reference.merged_weight(base.weight, adapter._replace(strength=strength), to)
            for to in (single, torch.float64)
        )
        usual, exact = (x.to(W) @ W.T + base.bias.to(W) for W in weights)
        reference.check_error(layer(x), usual.to(dtype), exact)
    layer.set_strength(0)
    assert torch.equal(layer(x), base(x))


def test_stacked_adapters_add_up():
    base, layer = reference.linear(32, 24, dtype=torch.float64)
    reference.randomize(layer)
    _, other = reference.linear(32, 24, dtype=torch.float64, rank=3, alpha=9)
    reference.randomize(other, seed=1)
    layer.set_strength(0.5)
    layer.stack("other", other.adaptation.spec, other.adapter_tensors(), -0.25)
    x = torch.randn(5, 32, dtype=torch.float64)
    W, V = (reference.merged_weight(base.weight, a._replace(strength=1.0)) for a in layer.adapters())
    expected = x @ (0.25 * V.neg() + 0.25 * base.weight + 0.5 * W + 0.5 * base.weight).T + base.bias
    reference.check_error(layer(x), expected, expected)
    layer.set_strength(0)
    assert torch.equal(layer(x), base(x))
    layer.set_strength(1, "other")
    reference.check_error(layer(x), other(x), other(x))
    with pytest.raises(ValueError, match="layer has an adapter named 'other'"):
        layer.stack("other", other.adaptation.spec, other.adapter_tensors(), 1.0)


def test_method_full_is_the_base_with_a_trained_weight():
    base, layer = reference.linear(8, 6, method="full")
    assert list(layer.adapter_tensors()) == ["weight"]
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None
    with pytest.raises(ValueError, match="no base"):
        layer.set_strength(0.5)
    assert torch.equal(layer(torch.ones(8)), base(torch.ones(8)))


# --- dtypes ---


def test_adapters_keep_their_precision():
    _, layer = reference.linear(8, 6)
    reference.randomize(layer)
    before = {name: p.detach().clone() for name, p in layer.adapter_tensors().items()}
    layer(torch.randn(2, 8)).sum().backward()
    layer.stack("other", layer.adaptation.spec, before, 0.5)
    for cast in (lambda: layer.half(), lambda: layer.to(torch.bfloat16), lambda: layer.to("cpu", torch.float32)):
        cast()
        for name, parameter in layer.adapter_tensors().items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(layer.adaptation.stacked["other"].tensors[name], before[name])
    assert layer.double().lora_A.dtype == torch.float64
    assert layer.half().lora_A.dtype == torch.float32


def test_output_dtype_is_that_of_the_base():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        _, layer = reference.linear(8, 6, dtype=dtype)
        reference.randomize(layer)
        assert layer(torch.randn(3, 8, dtype=dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 8, dtype=dtype)).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


def test_meta_layers_are_initialised_when_they_get_memory():
    with torch.device("meta"):
        layer = adapt_layer(nn.Linear(8, 6), DoRASpec(rank=2), path="a")
    layer.to_empty(device="cpu")
    assert torch.equal(layer.lora_A, adapt_layer(nn.Linear(8, 6), DoRASpec(rank=2), path="a").lora_A)
    base = nn.Linear(8, 6)
    layer.load_state_dict(base.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), base(x))


# --- fixed parameters ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_parameters_keep_what_depends_on_them(dtype):
    _, layer = reference.linear(32, 24, dtype=dtype)
    reference.randomize(layer)
    x = torch.randn(5, 32).to(dtype)
    with torch.no_grad(), fixed_parameters(layer):
        expected = layer(x)
        layer.magnitude.data.mul_(2)  # not allowed inside, and so not detected
        assert torch.equal(layer(x), expected)
        with fixed_parameters(layer), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), expected)
    assert reference.relative_error(layer(x), expected) > 0.1


def gradients_in_float64(layer, x):
    """Of the sum of the outputs, in the input and the adapter."""
    layer, x = reference.doubled(layer), x.detach().double().requires_grad_()
    return torch.autograd.grad(layer(x).sum(), [x, *layer.adapter_tensors().values()])


@pytest.mark.parametrize("num_passes", [0, 1000])
def test_gradients_inside_fixed_parameters(num_passes):
    """What is kept has no graph: gradients are those outside, in either form and in every pass."""
    _, layer = reference.linear(32, 24)
    reference.randomize(layer)
    x = torch.randn(5, 32, requires_grad=True)
    wanted = [x, *layer.adapter_tensors().values()]
    usual, exact = torch.autograd.grad(layer(x).sum(), wanted), gradients_in_float64(layer, x)
    with fixed_parameters(layer, num_passes=num_passes):
        with torch.no_grad():
            layer(x)
        for _ in range(2):
            found = torch.autograd.grad(layer(x).sum(), wanted)
            reference.check_errors(*map(reference.numbered, (found, usual, exact)))


# --- state dicts and copies ---


def test_a_base_state_dict_loads_strictly_into_a_fresh_layer():
    _, layer = reference.linear(8, 6)
    other = nn.Linear(8, 6)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), other(x))


def test_incomplete_adapters_are_missing_keys():
    _, layer = reference.linear(8, 6)
    state = layer.state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_adapters_keep_their_precision(assign):
    _, layer = reference.linear(8, 6, dtype=torch.bfloat16)
    reference.randomize(layer)
    layer.load_state_dict({k: v.half() for k, v in layer.state_dict().items()}, assign=assign)
    assert all(p.dtype == torch.float32 for p in layer.adapter_tensors().values())
    assert layer.lora_B.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate):
    _, layer = reference.linear(8, 6, rank=2, alpha=4)
    reference.randomize(layer)
    x = torch.randn(3, 8)
    expected = layer(x)
    with torch.no_grad(), fixed_parameters(layer):
        layer(x)
        twin = duplicate(layer)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.magnitude.zero_()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)
    assert set(adapter_parameters(twin)) == {".lora_A", ".lora_B", ".magnitude"}


def test_adapting_in_place_keeps_hooks_and_restores_the_class():
    layer = nn.Linear(8, 6)
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    attributes = set(vars(layer))
    adapt_layer(layer, DoRASpec())
    layer(torch.ones(8))
    assert called
    assert not layer.weight.requires_grad
    assert "rank=8" in repr(layer)
    restore_layer(layer)
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == attributes
    assert layer.weight.requires_grad
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(dtype):
    _, layer = reference.linear(16, 8, dtype=dtype)
    reference.randomize(layer)
    x = torch.randn(4, 16).to(dtype)
    twin = reference.doubled(layer)
    outputs = torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x), twin(x.double())
    reference.check_error(*outputs)
    gradients = [
        torch.autograd.grad(y.sum(), list(each.adapter_tensors().values()))
        for y, each in zip(outputs, (layer, layer, twin), strict=True)
    ]
    reference.check_errors(*map(reference.numbered, gradients), dtype=dtype)

"""What only a GPU can test: CUDA graphs, inductor, sizes beyond 32 bits, and models on the kernels."""

import copy
import functools

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm.core import DoRASpec, adapt_layer, adapter_parameters, merge
from tests.shared import reference

pytestmark = pytest.mark.gpu


def network(dtype=torch.bfloat16, **spec):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 320), nn.GELU(), nn.Linear(320, 192, bias=False)).cuda().to(dtype)
    net.requires_grad_(False)
    dora_mm.inject(net, ["0", "2"], DoRASpec(**{"rank": 16, **spec}), backend="triton")
    for index in (0, 2):
        reference.randomize(net[index])
    return net


def step(net, x, dY):
    for parameter in adapter_parameters(net).values():
        parameter.grad = None
    y = net(x)
    y.backward(dY)
    return [y.detach(), *(p.grad for p in adapter_parameters(net).values())]


def inputs(tokens=300, dtype=torch.bfloat16):
    return torch.randn(tokens, 256, device="cuda", dtype=dtype), torch.randn(tokens, 192, device="cuda", dtype=dtype)


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert reference.relative_error(a, b.double()) < tolerance


def convolutions(dtype=torch.bfloat16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 24, 1, bias=False)).cuda().to(dtype)
    net.requires_grad_(False)
    dora_mm.inject(net, ["0", "2"], DoRASpec(rank=16))
    for index in (0, 2):
        reference.randomize(net[index])
    return net


def images(dtype=torch.bfloat16):
    return [torch.randn(2, channels, 20, 20, device="cuda", dtype=dtype) for channels in (16, 24)]


@pytest.mark.parametrize(
    ("build", "draw"),
    [(network, inputs), (functools.partial(network, norm_grad="exact"), inputs), (convolutions, images)],
)
def test_a_step_in_a_cuda_graph(build, draw):
    """Nothing in forward or backward waits for the GPU, and nothing is read back from it."""
    net = build()
    x, dY = draw()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, x, dY)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(net, x, dY)
    other_x, other_dY = draw()
    x.copy_(other_x)
    dY.copy_(other_dY)
    graph.replay()
    torch.cuda.synchronize()
    found = [t.clone() for t in captured]
    assert_close(found, step(net, other_x, other_dY), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_by_inductor_in_one_graph(dtype):
    net = network(dtype)
    x, dY = inputs(dtype=dtype)
    expected = step(net, x, dY)
    compiled = torch.compile(net, fullgraph=True)
    for parameter in adapter_parameters(net).values():
        parameter.grad = None
    y = compiled(x)
    y.backward(dY)
    found = [y.detach(), *(p.grad for p in adapter_parameters(net).values())]
    assert_close(found, expected, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_gpu_than_the_current_one():
    net = network().to("cuda:1")
    x, dY = (t.to("cuda:1") for t in inputs())
    found = step(net, x, dY)
    with torch.cuda.device(1):
        assert_close(found, step(net, x, dY), 1e-6)


def test_more_than_2_31_elements():
    tokens = 2**25 + 8  # times 64 features
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).cuda().to(torch.bfloat16).requires_grad_(False)
    dora_mm.inject(layer, ["0"], DoRASpec(rank=4), backend="triton")
    reference.randomize(layer[0])
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, dY = layer(x), torch.zeros(tokens, 64, device="cuda", dtype=torch.bfloat16)
    ends = [slice(0, 8), slice(tokens - 8, tokens)]
    for rows in ends:
        dY[rows] = torch.randn(8, 64, device="cuda")
    trained = [x, *layer[0].adapter_tensors().values()]
    dX, *found = torch.autograd.grad(y, trained, dY)
    sums = [torch.zeros_like(t) for t in found]
    for rows in ends:
        part = x[rows].detach().clone().requires_grad_()
        some = layer(part)
        assert reference.relative_error(y[rows], some.double()) < 1e-2
        own, *more = torch.autograd.grad(some, [part, *trained[1:]], dY[rows])
        assert reference.relative_error(dX[rows], own.double()) < 1e-2
        sums = [a + b for a, b in zip(sums, more, strict=True)]
    for a, b in zip(found, sums, strict=True):
        assert reference.relative_error(a, b.double()) < 1e-2


def test_a_merged_model_computes_what_a_base_model_does():
    net = network()
    bare = copy.deepcopy(net)
    dora_mm.remove(bare)
    x, _ = inputs()
    adapted = net(x)
    merge(net)
    assert reference.relative_error(net(x), adapted.double()) < 2e-2
    for index in (0, 2):
        bare[index].weight.data = net[index].weight.data
    assert torch.equal(net(x), bare(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_over_a_float32_base(dtype):
    net = network(torch.float32)
    x, _ = inputs(dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        y = net(x)
    assert y.dtype == dtype
    assert reference.relative_error(y, net(x).double()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_dm_needs_a_product(dtype):
    """Plain torch asks the GPU for them: some have a large bias, and one a gain of 0."""
    torch.manual_seed(0)
    base = nn.Conv2d(16, 32, 3, padding=1).cuda().to(dtype).requires_grad_(False)
    base.bias[::3] = 100
    layer = reference.randomize(adapt_layer(copy.deepcopy(base), DoRASpec(rank=4)))
    with torch.no_grad():
        layer.magnitude[5] = 0
    x, dY = torch.randn(2, 16, 20, 20, device="cuda").to(dtype), torch.randn(2, 32, 20, 20, device="cuda").to(dtype)
    (found,) = torch.autograd.grad(layer(x), layer.magnitude, dY)
    W = reference.merged_weight(base.weight, layer.adapters()[0])
    y = nn.functional.conv2d(x.double(), W, padding=1)
    (expected,) = torch.autograd.grad(y, layer.magnitude, dY.double())
    assert reference.relative_error(found, expected.double()) < (1e-4 if dtype == torch.float32 else 2e-2)

"""Every kernel against float64, by the rule of the project: at most twice the error of plain torch, plus one rounding.

Without a GPU they run in Triton's interpreter, in fp32 and fp16 (its bf16 products are wrong in triton 3.9).
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

triton = pytest.importorskip("triton")

from dora_mm.core import Adapter, DoRASpec, adapt_layer  # noqa: E402
from dora_mm.core.functional import row_norm as base_norm  # noqa: E402
from dora_mm.core.functional import updated_norm  # noqa: E402
from dora_mm.core.passes import Options  # noqa: E402
from dora_mm.kernels import dora_linear  # noqa: E402
from dora_mm.kernels.adapter_grads import adapter_grads  # noqa: E402
from dora_mm.kernels.common import float_product, num_blocks, padded_rank, rank_block  # noqa: E402
from dora_mm.kernels.dora_linear import TRITON  # noqa: E402
from dora_mm.kernels.gpus import gpu_of, vendor_is_faster  # noqa: E402
from dora_mm.kernels.low_rank_add import low_rank_add  # noqa: E402
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear  # noqa: E402
from dora_mm.kernels.operands import REST_FACTOR, operands  # noqa: E402
from dora_mm.kernels.output_grad import output_grad  # noqa: E402
from dora_mm.kernels.row_norm import row_norm  # noqa: E402
from tests.shared import reference  # noqa: E402

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
PRODUCTS = [(dtype, vendor) for dtype in DTYPES for vendor in (False, True) if vendor or dtype != torch.float32]
SHAPES = [(5, 7, 3), (64, 48, 16), (70, 33, 17), (1, 130, 40), (16, 20, 66)]  # out, in, rank


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_as_good_as(found, plain, exact):
    """||err|| <= 2 ||plain torch's err|| + u ||exact||."""
    unit = torch.finfo(found.dtype).eps / 2
    error = (found.double() - exact).norm()
    assert error <= 2 * (plain.double() - exact).norm() + unit * exact.norm(), error / exact.norm()


def strided(t):
    """The same values with gaps between the rows and between the columns."""
    wide = t.new_zeros(t.shape[0] * 2, t.shape[1] * 3)
    wide[::2, ::3] = t
    return wide[::2, ::3]


LAYOUTS = [*((shape, torch.Tensor.contiguous) for shape in SHAPES), *((shape, strided) for shape in SHAPES[1:3])]


def norm_of(W0, A, B, scaling, n0, m):
    """n and g by the kernel, from the products that a layer makes."""
    parts = A if W0.dtype == torch.float32 else operands(A, W0.dtype, True)
    return row_norm(W0, float_product(W0, parts.T), float_product(parts, parts.T), A, B, scaling, n0, m)


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norm(shape, dtype, layout):
    out, inner, rank = shape
    W0, A, B = random(out, inner, dtype=dtype), random(rank, inner, seed=1), 0.3 * random(out, rank, seed=2)
    n0 = base_norm(W0)
    m = n0 * 1.1
    norm, gain = norm_of(layout(W0), layout(A), layout(B), 0.7, n0, m)
    exact = (W0.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    assert_as_good_as(norm, updated_norm(W0.float(), A, B, 0.7, n0), exact)
    assert torch.equal(gain, m / norm)
    again, _ = norm_of(layout(W0), layout(A), layout(B), 0.7, None, m)  # n0 in the same pass
    assert reference.relative_error(again, norm) < 3e-7


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_of_A_are_as_good_as_all_of_it(dtype, size):
    """Updates of `size` times the weight; the smallest entries of A are subnormal in fp16."""
    W0, A, B = (0.03 * random(200, 256)).to(dtype), random(16, 256, seed=1) / 16, random(200, 16, seed=2)
    A[:4] *= 1e-4
    B *= size * W0.float().norm() / (B @ A).norm()
    exact = (W0.double() + B.double() @ A.double()).norm(dim=1)
    n0 = base_norm(W0)
    norm, _ = norm_of(W0, A, B, 1.0, n0, n0)
    assert ((norm.double() - exact).abs() / exact).max() < 5e-7


def test_row_norm_without_an_update_and_of_empty_rows():
    for dtype in DTYPES:
        W0 = random(9, 40, dtype=dtype)
        W0[3] = 0
        n0 = base_norm(W0)
        norm, gain = norm_of(W0, random(4, 40), torch.zeros(9, 4, device=DEVICE), 1.0, n0, n0.clone())
        assert torch.equal(norm, n0)
        assert torch.equal(gain, torch.ones_like(gain))


@pytest.mark.parametrize("residual", [1e-2, 1e-4])
@pytest.mark.parametrize("rank", [8, 40])
def test_row_norm_where_the_update_nearly_cancels_the_weight(residual, rank):
    """In some rows, those of one program among them."""
    A, B = random(rank, 64), random(40, rank, seed=1)
    W0 = -0.5 * B @ A + residual * random(40, 64, seed=2)
    W0[5:20] = random(15, 64, seed=3)
    n0 = base_norm(W0)
    norm, _ = norm_of(W0, A, B, 0.5, n0, n0)
    exact = (W0.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    assert_as_good_as(norm, (W0 + 0.5 * B @ A).norm(dim=1), exact)


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
def test_operands_are_filled_up_with_zeros(rank):
    A = random(rank, 1100)
    for dtype in set(DTYPES) - {torch.float32}:
        parts, rows = operands(strided(A), dtype, True), padded_rank(rank)
        assert rows % 16 == 0
        assert len(parts) == 2 * rows
        assert torch.equal(parts[:rank], A.to(dtype))
        assert torch.equal(operands(A, dtype, False), parts[:rows])
        assert parts[rank:rows].count_nonzero() == 0
        whole = parts[:rank].double() + parts[rows:][:rank].double() / REST_FACTOR[dtype]
        assert reference.relative_error(whole, A) < 2.0**-16


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "vendor"), PRODUCTS)
def test_low_rank_products(shape, dtype, vendor, layout):
    out, inner, rank = shape
    for tokens in (0, 1, 37, 130):
        x, W0 = layout(random(tokens, inner, dtype=dtype)), layout(random(out, inner, dtype=dtype, seed=1))
        A, B = random(rank, inner, seed=2), random(out, rank, seed=3)
        gain, bias = random(out, seed=4), random(out, dtype=dtype, seed=5)
        h = F.pad(x @ A.to(dtype).T, (0, padded_rank(rank) - rank))
        rounded = (0.7 * B).to(dtype)
        for gain_first in (False, True):
            y = low_rank_linear(x, W0, bias, gain, h, B, 0.7, gain_first, vendor)
            factor = torch.ones_like(gain) if gain_first else gain
            branch = h[:, :rank].double() @ rounded.double().T
            exact = gain.double() * (x.double() @ W0.double().T) + factor.double() * branch + bias.double()
            plain = gain * (x @ W0.T) + factor * (h[:, :rank] @ rounded.T) + bias
            assert_as_good_as(y, plain, exact)
        dY = layout(random(tokens, out, dtype=dtype, seed=6))
        u = F.pad(dY @ B.to(dtype), (0, padded_rank(rank) - rank))
        scaled = (dY.float() * gain).to(dtype)
        dX = low_rank_grad_input(*((scaled, W0, None) if vendor else (dY, W0, gain)), u, A, vendor)
        exact = scaled.double() @ W0.double() + u[:, :rank].double() @ A.to(dtype).double()
        assert_as_good_as(dX, scaled @ W0 + u[:, :rank] @ A.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_reads_any_layout_and_skips_what_is_none(dtype):
    P, gain = strided(random(70, 33, dtype=dtype)), random(33, seed=1)
    assert torch.equal(low_rank_add(P, None, gain, None, None, 1.0, dtype), (P.float() * gain).to(dtype))
    assert torch.equal(low_rank_add(P[:1].expand(70, 33), None, None, None, None, 1.0, dtype), P[:1].repeat(70, 1))


def test_products_without_gain_bias_or_rank():
    x, W0 = random(10, 12), random(6, 12, seed=1)
    for vendor in (False, True):
        y = low_rank_linear(x, W0, None, None, None, None, 1.0, False, vendor)
        assert reference.relative_error(y, x @ W0.T) < 1e-6
        assert reference.relative_error(low_rank_grad_input(y, W0, None, None, None, vendor), x @ W0.T @ W0) < 1e-6


READINGS = [(tokens, *what) for tokens in (1, 70, 600) for what in itertools.product((True, False), repeat=3)]
READINGS = [case for case in READINGS if case[2] or case[3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "has_branch", "has_bias", "has_output"),
    [c if c[0] == 70 or all(c) else pytest.param(*c, marks=pytest.mark.slow) for c in READINGS],
)
def test_one_reading_of_the_output_gradient(dtype, tokens, has_branch, has_bias, has_output):
    """Rows 1 and 4 have a small gain; with a bias, that of row 2 is much larger than y; the norm of row 3 is 0."""
    dY, x, W0 = random(tokens, 9, dtype=dtype), random(tokens, 50, dtype=dtype, seed=1), random(9, 50, seed=2)
    A, B = random(5, 50, seed=3), random(9, 5, seed=4) if has_branch else None
    W0[3] = 0
    if B is not None:
        B[3] = 0
    W0, h, bias = W0.to(dtype), None, random(9, dtype=dtype, seed=5) if has_bias else None
    inner = x.double() @ W0.double().T
    if B is not None:
        h = F.pad(x @ A.to(dtype).T, (0, padded_rank(5) - 5))
        inner = inner + h[:, :5].double() @ (0.5 * B).to(dtype).double().T
    norm, gain = inner.norm(dim=0).float() + 1, torch.full((9,), 1.1, device=DEVICE)
    norm[3], gain[[1, 4]] = 0, 1e-3
    if bias is not None:
        bias[2] = 1e4
    y = (gain * inner + (0 if bias is None else bias)).to(dtype) if has_output else None
    magnitude = gain * norm
    given = strided(dY), y, strided(x), W0, h, B, bias, magnitude, norm, gain, 0.5
    scaled, dots, operand = output_grad(*given, True, True)
    assert torch.equal(scaled, (dY.float() * gain).to(dtype))
    expected = (dY.double() * inner).sum(0) / norm.double()
    expected[3] = 0
    _, dm = adapter_grads(None, 0, dots, gain, 0.5)
    scale = (dY.double() * inner).abs().sum(0) / norm.double().clamp(min=1) + 1e-6  # of the sums' terms
    unit = torch.finfo(dtype).eps if has_output else 2.0**-20
    assert ((dm - expected).abs() <= 4 * unit * scale)[[0, 1, 3, 4, 5, 6, 7, 8]].all()
    assert (dm[2] - expected[2]).abs() <= 2.0**-18 * scale[2] if has_bias else True
    if B is not None:
        assert torch.equal(operand[:, :5], (0.5 * gain[:, None] * B).to(dtype))
        assert operand[:, 5:].count_nonzero() == 0
    alone, none, same = output_grad(*given, False, False)
    assert alone.numel() == none.numel() == 0
    assert torch.equal(same, operand)


@pytest.mark.parametrize("rank", [3, 16, 20])
def test_gradients_of_an_adapter_from_their_parts(rank):
    product, dots, gain = random(37, padded_rank(rank)), random(9, 37, seed=1), random(37, seed=2)
    dB, dm = adapter_grads(product, rank, dots, gain, 0.5)
    assert reference.relative_error(dB, (0.5 * gain[:, None] * product)[:, :rank]) < 1e-6
    assert reference.relative_error(dm, dots.double().sum(0)) < 1e-6
    assert torch.equal(adapter_grads(product, rank, None, None, 1.0)[0], product[:, :rank])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_need_care_on_triton(bias):
    """With a magnitude of 0 or a bias much larger than y, dm is computed by the product with V, as in plain torch."""
    fast, plain = layers(torch.float32, bias=bias)
    for layer in (fast, plain):
        with torch.no_grad():
            layer.magnitude[:3] = torch.tensor([0.0, 1e-20, -1e-3])
            if bias:
                layer.bias[5:9] = 1e4
    x, dY = random(30, 40), random(30, 24, seed=1)
    found, expected = (torch.autograd.grad(layer(x), layer.magnitude, dY)[0] for layer in (fast, plain))
    assert reference.relative_error(found, expected) < 1e-6


# --- the layer ---


def layers(dtype, *, bias=True, **spec):
    """Returns a layer in Triton and one in plain torch, with the same trained values."""
    _, plain = reference.linear(40, 24, bias=bias, dtype=dtype, **spec)
    reference.randomize(plain.to(DEVICE))
    twin = nn.Linear(40, 24, bias=bias, dtype=dtype, device=DEVICE)
    twin.load_state_dict({k: v for k, v in plain.state_dict().items() if k in ("weight", "bias")})
    fast = adapt_layer(twin, plain.adaptation.spec, forward=TRITON)
    fast.load_state_dict(plain.state_dict())
    return fast, plain


@pytest.mark.parametrize(("dtype", "vendor"), PRODUCTS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize(("norm_grad", "bias"), [("detached", True), ("exact", False)])
def test_layer(dtype, method, norm_grad, bias, vendor, monkeypatch):
    monkeypatch.setattr(dora_linear, "vendor_is_faster", lambda t, inner_size, back=False: vendor)
    fast, plain = layers(dtype, method=method, norm_grad=norm_grad, bias=bias)
    x, dY = random(2, 30, 40, dtype=dtype).requires_grad_(), random(2, 30, 24, dtype=dtype, seed=9)
    double = [p.detach().double().requires_grad_() for p in plain.adapter_tensors().values()]
    names = {"lora_A": "A", "lora_B": "B"}
    adapter = plain.adapters()[0]._replace(
        **{names.get(n, n): t for n, t in zip(plain.adapter_tensors(), double, strict=True)}
    )
    exact_x = x.detach().double().requires_grad_()
    W = reference.merged_weight(plain.weight, adapter)
    exact = F.linear(exact_x, W, None if plain.bias is None else plain.bias.double())
    expected = torch.autograd.grad(exact, [exact_x, *double], dY.double())
    found, others = (
        (layer(x), *torch.autograd.grad(layer(x), [x, *layer.adapter_tensors().values()], dY))
        for layer in (fast, plain)
    )
    for a, b, right in zip(found, others, (exact, *expected), strict=True):
        assert a.dtype == b.dtype
        if dtype == torch.float32:
            assert_as_good_as(a, b, right)
        else:  # A, s B and g dY are rounded to the dtype of the operands: one more rounding
            assert reference.relative_error(a, right) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "vendor"), PRODUCTS)
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_output_may_be_overwritten(dtype, method, vendor, monkeypatch):
    """dm is then computed by a product with V."""
    monkeypatch.setattr(dora_linear, "vendor_is_faster", lambda t, inner_size, back=False: vendor)
    fast, plain = layers(dtype, method=method, save_output=False)
    for shape in ((30, 40), (2, 30, 40)):
        x = random(*shape, dtype=dtype)
        found, expected = (
            torch.autograd.grad(layer(x).relu_().sum(), list(layer.adapter_tensors().values()))
            for layer in (fast, plain)
        )
        for a, b in zip(found, expected, strict=True):
            assert reference.relative_error(a, b) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_without_a_magnitude(dtype):
    fast, plain = layers(dtype, method="lora", dropout=0.4)
    x = random(30, 40, dtype=dtype).requires_grad_()
    A, B = fast.lora_A, fast.lora_B
    torch.manual_seed(5)
    with reference.NewTensors() as allocated:
        found = torch.autograd.grad(fast(x).sum(), [x, A, B])
    assert (30, 24) in allocated.shapes
    assert (24, 40) not in allocated.shapes  # the update is never built
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4).double()
    y = (
        F.linear(x.double(), plain.weight.double())
        + dropped @ A.double().T @ B.double().T * fast.adaptation.spec.scaling
    )
    for a, exact in zip(found, torch.autograd.grad(y.sum(), [x, A, B]), strict=True):
        assert reference.relative_error(a, exact) < 4 * torch.finfo(dtype).eps


def test_gradients_are_contiguous():
    for dtype in DTYPES:
        fast, _ = layers(dtype)
        found = torch.autograd.grad(fast(random(30, 40, dtype=dtype)).sum(), list(fast.adapter_tensors().values()))
        assert all(t.is_contiguous() for t in found)


def test_bias_and_magnitude_may_be_parts_of_other_tensors():
    fast, plain = layers(torch.float32)
    for layer in (fast, plain):
        layer.bias.data, layer.magnitude.data = random(48, seed=1)[::2], random(48, seed=2).abs()[::2] + 1
    x = random(30, 40).requires_grad_()
    found, expected = (
        (layer(x), *torch.autograd.grad(layer(x).square().sum(), [x, layer.magnitude])) for layer in (fast, plain)
    )
    for a, b in zip(found, expected, strict=True):
        assert reference.relative_error(a, b) < 1e-5


def test_layers_on_a_cpu_run_without_kernels(monkeypatch):
    monkeypatch.setattr(dora_linear, "INTERPRETED", False)
    fast, plain = (layer.cpu() for layer in layers(torch.float32))
    assert torch.equal(fast(torch.ones(3, 40)), plain(torch.ones(3, 40)))


@pytest.mark.parametrize("autocast", [False, True])
def test_several_adapters_and_strengths(autocast):
    fast, plain = layers(torch.float32)
    for layer in (fast, plain):
        layer.set_strength(0.5)
        layer.stack("other", DoRASpec(4), {n: 1.1 * t for n, t in layer.adapter_tensors().items()}, -0.3)
    x = random(20, 40)
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16, enabled=autocast):
        found, expected = fast(x), plain(x)
    assert found.dtype == expected.dtype
    assert reference.relative_error(found, expected) < (1e-3 if autocast else 1e-6)


def test_what_has_no_kernel_runs_in_plain_torch():
    for layer, x in (
        (nn.Embedding(9, 6), torch.tensor([[3, 0], [8, 3]])),
        (nn.Conv2d(4, 6, 3), torch.randn(1, 4, 8, 8)),
        (nn.Linear(4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)),
    ):
        plain = reference.randomize(adapt_layer(layer, DoRASpec(2)))
        expected = plain(x)
        plain.adaptation.forward = TRITON
        assert torch.equal(plain(x), expected)
    dropping = reference.randomize(adapt_layer(nn.Linear(8, 6), DoRASpec(2, dropout=0.5), forward=TRITON))
    assert dropping(torch.randn(3, 8)).shape == (3, 6)


@pytest.mark.parametrize("layer_dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(layer_dtype):
    fast, _ = layers(layer_dtype)
    x = random(6, 40, dtype=layer_dtype)
    found = torch.compile(fast, backend="aot_eager", fullgraph=True)(x)
    assert reference.relative_error(found, fast(x)) <= torch.finfo(layer_dtype).eps


@pytest.mark.parametrize("num_in", [64, 2048])
def test_a_compiled_layer_runs_the_product_of_an_eager_one(num_in):
    """The choice is made while the graph is traced, and the product and its pass are one operator in it."""
    base = nn.Linear(num_in, 48, bias=False, dtype=torch.float16, device=DEVICE)
    layer = reference.randomize(adapt_layer(base, DoRASpec(4), forward=TRITON))
    x, found = random(6, num_in, dtype=torch.float16), []

    def record(module, _):
        graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
        nodes = [node for graph in graphs for node in graph.nodes]
        found.extend(node.args[-1] for node in nodes if "low_rank_linear" in str(node.target))
        return module.forward

    torch.compile(layer, backend=record, fullgraph=True)(x)
    assert found == [vendor_is_faster(x, num_in)] == [num_in == 2048]


def test_a_compiled_layer_whose_output_is_overwritten():
    fast, plain = layers(torch.float32)
    x = random(6, 40)

    def run(layer):
        return layer(x).mul_(3).square().sum()

    found = torch.compile(run, backend="aot_eager")(fast)
    names = list(fast.adapter_tensors())
    expected = torch.autograd.grad(run(plain), list(plain.adapter_tensors().values()))
    gradients = torch.autograd.grad(found, list(fast.adapter_tensors().values()))
    for name, a, b in zip(names, gradients, expected, strict=True):
        assert reference.relative_error(a, b) < 1e-5, name


def test_small_updates_survive_half_precision():
    """Nothing is lost of an update of 4e-4 of the weight: the base is exact in fp16, the update up to 2^-11."""
    W0, adapter = reference.make(64, 64, 16, dtype=torch.float32, scaling=1.0, size=1e-4)
    W0 = W0.half().to(DEVICE)
    A, B = adapter.A.detach().to(DEVICE), adapter.B.detach().to(DEVICE)
    adapter = Adapter(A, B, base_norm(W0) * (1 + 1e-4))
    x = random(2000, 64, dtype=torch.float16)
    y = TRITON(x, W0, None, [adapter], Options())
    update = x.double() @ (reference.merged_weight(W0, adapter) - W0.double()).T
    share = (((y.double() - x.double() @ W0.double().T) * update).sum() / update.square().sum()).item()
    assert abs(share - 1) <= 0.03


def test_the_benchmark_of_products_compares_like_with_like():
    from tests.benchmarks import bench_products

    device = torch.device(DEVICE)
    for products in bench_products.candidates((20, 24, 40), torch.float32, device).values():
        assert reference.relative_error(products["one kernel"](), products["vendor and a pass"]().double()) < 1e-5


def test_a_pass_calls_no_slow_helper_of_triton(monkeypatch):
    """Outside of a kernel they take a microsecond or more each: 12 calls a step were a tenth of the host's time."""
    for name in ("cdiv", "next_power_of_2"):
        monkeypatch.setattr(triton, name, None)
    layer = reference.randomize(adapt_layer(nn.Linear(40, 24).to(DEVICE), DoRASpec(4), forward=TRITON))
    layer(random(70, 40).requires_grad_()).sum().backward()


def test_a_gpu_that_is_older_than_the_table_has_choices():
    """It may be the second in a machine, and must not keep the first from running kernels."""
    assert gpu_of((7, 5)) == gpu_of((8, 0))


def test_sizes_of_launches():
    assert [num_blocks(size, 16) for size in (0, 1, 16, 17)] == [0, 1, 1, 2]
    for rank in range(1, 130):
        assert rank_block(rank, torch.ones(1, dtype=torch.float16)) == max(16, min(32, triton.next_power_of_2(rank)))
        assert rank_block(rank, torch.ones(1)) == 16

"""Both forms of the layer, value and every gradient, against autograd of the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from dora_mm.core import DoRASpec, adapt_layer
from dora_mm.core import functional as dora
from dora_mm.core.forms import adapted_product, choose_form, merged_parts, split_weight
from dora_mm.core.passes import Options
from tests.shared import reference
from tests.shared.reference import make, variants

FORMS = ("unmerged", "merged")


def product(x, W0, bias, adapters, form="merged", **options):
    """Runs one form, by setting how many passes W(t) would serve."""
    num_passes = math.inf if form == "merged" else 0
    return adapted_product(x, W0, bias, adapters, Options(num_passes=num_passes, **options))


def expected_product(x, W0, bias, adapter, dtype=torch.float64):
    return x.to(dtype) @ reference.merged_weight(W0, adapter, dtype).T + (0 if bias is None else bias.to(dtype))


@settings(max_examples=60)
@given(
    out=st.integers(1, 17),
    inner=st.integers(1, 17),
    rank=st.integers(1, 5),
    tokens=st.integers(0, 6),
    strength=st.sampled_from([1.0, 0.5, -1.0, 1e-5]),
    norm_grad=st.sampled_from(["detached", "exact"]),
    form=st.sampled_from(FORMS),
    has_bias=st.booleans(),
    keep_weight=st.booleans(),
    save_output=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(15, 1, 3, 3, 1.0, "exact", "unmerged", False, False, False, 114)
def test_value_and_gradients_equal_autograd_of_the_formula(
    out, inner, rank, tokens, strength, norm_grad, form, has_bias, keep_weight, save_output, seed
):
    W0, adapter = make(out, inner, rank, strength=strength, norm_grad=norm_grad, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, inner, dtype=torch.float64, generator=g, requires_grad=True)
    dY = torch.randn(tokens, out, dtype=torch.float64, generator=g)
    bias = torch.randn(out, dtype=torch.float64, generator=g).requires_grad_() if has_bias else None
    for _, variant in variants(adapter):
        wanted = [t for t in (x, bias, *variant[:3]) if t is not None]
        y = product(x, W0, bias, [variant], form, keep_weight=keep_weight, save_output=save_output)
        right = expected_product(x, W0, bias, variant)
        reference.check_error(y, right, right)
        found, expected = (torch.autograd.grad(of, wanted, dY) for of in (y, right))
        # float64 against float64: what is left are orders of summation. What norm_grad `exact` subtracts from the
        # detached gradients may cancel them: with one column, all of them
        detached = expected_product(x, W0, bias, variant._replace(norm_grad="detached"))
        terms = torch.autograd.grad(detached, wanted, dY)
        for a, b, term in zip(found, expected, terms, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * (1 + term.abs().max().item() if b.numel() else 1))


@pytest.mark.parametrize("form", FORMS)
def test_every_adapter_of_a_layer_gets_its_gradient(form):
    W0, one = make(6, 8, 2, seed=1, strength=0.7, norm_grad="exact")
    _, two = make(6, 8, 3, seed=2, strength=-0.4)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = product(x, W0, None, [one, two], form)
    W = reference.merged_weight(W0, one) + reference.merged_weight(W0, two) - W0
    right, wanted = x @ W.T, (x, *one[:3], *two[:3])
    reference.check_error(y, right, right)
    dY = torch.randn_like(y)
    found, expected = (reference.numbered(torch.autograd.grad(of, wanted, dY)) for of in (y, right))
    reference.check_errors(found, expected, expected)


# --- which form ---


@pytest.mark.parametrize(("out", "inner", "rank"), [(1280, 1280, 16), (640, 640, 16), (1280, 2048, 4), (64, 64, 128)])
def test_the_form_changes_where_the_counted_costs_meet(out, inner, rank):
    def form(tokens, num_passes=1.0):
        return choose_form(tokens, out, inner, rank, num_passes=num_passes)

    edge = next(t for t in range(1, 100_000) if form(t) == "merged")
    assert 1 < edge < 2 * max(out, inner)
    assert form(edge - 1) == "unmerged"
    assert form(edge // 2 + 1, num_passes=2) == "merged"  # a weight that serves twice pays at half as many
    assert form(1, num_passes=math.inf) == "merged"


def test_a_checkpointed_unet_at_512_px_builds_no_weight_in_its_1280_wide_layers():
    """256 tokens, in the pass and in its recomputation: hundreds of W' at once would take 2.4 GB of new memory."""
    assert choose_form(256, 1280, 1280, 16, num_passes=2) == "unmerged"
    assert choose_form(4096, 1280, 1280, 16, num_passes=2) == "merged"


def test_half_precision_is_merged_where_the_branch_cannot_be_part_of_the_product():
    """A gain would scale, and the branch be added to, a product that is rounded already."""

    def form(tokens, **settings):
        return choose_form(tokens, 64, 64, 4, half=True, **settings)

    assert form(1) == form(10_000) == "merged"
    assert form(10_000, has_magnitude=False) == "unmerged"
    assert form(1, has_magnitude=False, num_passes=math.inf) == "unmerged"
    assert form(10_000, has_magnitude=False, joins=False) == "merged"


def test_dropout_builds_the_update_only_for_a_magnitude():
    assert choose_form(1, 64, 64, 4, dropout=True) == "merged"
    for half in (False, True):
        assert choose_form(10_000, 64, 64, 4, dropout=True, has_magnitude=False, half=half) == "unmerged"


# --- what is kept for the backward pass ---


def saved_sizes(run):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = run()
    storages = {t.untyped_storage().data_ptr(): t for t in (*found, y)}
    return sorted(t.numel() for t in storages.values() if t.numel() > 64 * 4)


@pytest.mark.parametrize(
    ("form", "keep_weight", "save_output", "weights"),
    [
        ("merged", True, True, 2),
        ("merged", False, True, 1),
        ("merged", False, False, 1),
        ("unmerged", True, True, 1),
    ],
)
def test_what_is_saved(form, keep_weight, save_output, weights):
    """x and y (which the next operation keeps anyway), W0, and W(t) if allowed; all else is (T, R) or smaller."""
    W0, adapter = make(64, 96, 4, dtype=torch.float32)
    x = torch.randn(500, 96, requires_grad=True)
    options = {"keep_weight": keep_weight, "save_output": save_output}
    expected = [64 * 96] * weights + [500 * 64, 500 * 96] + ([] if form == "merged" else [500 * 4]) + [4 * 96]
    assert saved_sizes(lambda: product(x, W0, None, [adapter], form, **options)) == sorted(expected)
    y = product(x, W0, None, [adapter], form, **options)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert any(t.shape == y.shape for t in saved) is save_output


@pytest.mark.parametrize("shape", [(64, 8), (2, 300, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"save_output": False}, {"save_output": False, "dropout": 0.1}]
)
def test_an_output_in_any_precision_may_be_overwritten(shape, dtype, options):
    _, layer = reference.linear(8, 6, dtype=dtype, **options)
    reference.randomize(layer)
    layer(torch.randn(shape).to(dtype)).relu_().sum().backward()
    assert layer.lora_B.grad.isfinite().all()


# --- rows that need care ---


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_are_no_ops_and_stay_finite(form):
    W0, adapter = make(4, 6, 2, norm_grad="exact")
    W0[1] = 0
    with torch.no_grad():
        adapter.magnitude[1] = 0
        adapter.B[1] = 0
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = product(x, W0, None, [adapter], form)
    dY = torch.randn_like(y)
    y.backward(dY)
    assert torch.equal(y[:, 1], torch.zeros(3, dtype=torch.float64))
    assert all(t.grad.isfinite().all() for t in (x, adapter.A, adapter.B, adapter.magnitude))
    if form != "base":  # g is 1, so that such a row learns
        expected = adapter.scaling * dY[:, 1] @ (x @ adapter.A.T)
        reference.check_error(adapter.B.grad[1], expected, expected)


@pytest.mark.parametrize("large", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_gradient_under_a_large_bias(large, dtype):
    """Rows with a bias much larger than y - b use x V^T: from y - b, bf16 would be off by a fifth at a bias of 100."""
    W0, adapter = make(64, 96, 4, dtype=torch.float32, size=0.05)
    x, dY = torch.randn(200, 96), torch.randn(200, 64)
    bias = torch.where(torch.arange(64) % 2 == 0, large, 0.0)
    y = adapted_product(x.to(dtype), W0.to(dtype), bias.to(dtype), [adapter], Options())
    (dm,) = torch.autograd.grad(y, adapter.magnitude, dY.to(dtype))
    exact = expected_product(x.to(dtype), W0.to(dtype), None, adapter)
    (expected,) = torch.autograd.grad(exact, adapter.magnitude, dY.to(dtype).double())
    V = reference.merged_weight(W0.to(dtype), adapter._replace(magnitude=None), torch.float32).detach()
    usual = (dY.to(dtype).float() * F.linear(x.to(dtype), V.to(dtype))).sum(0) / V.norm(dim=1)
    reference.check_error(dm, usual, expected, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_zero_tiny_and_negative_magnitudes(form):
    W0, adapter = make(16, 24, 2, dtype=torch.float32)
    with torch.no_grad():
        adapter.magnitude[:5] = torch.tensor([0.0, 1e-30, -1e-9, 1e-3, -1.0])
    x, bias = torch.randn(50, 24), torch.randn(16)
    y = product(x, W0, bias, [adapter], form)
    dY = torch.randn_like(y)
    (dm,) = torch.autograd.grad(y, adapter.magnitude, dY)
    usual, right = (expected_product(x, W0, bias, adapter, dtype) for dtype in (torch.float32, torch.float64))
    reference.check_error(y, usual, right)
    usual, expected = (torch.autograd.grad(each, adapter.magnitude, dY.to(each))[0] for each in (usual, right))
    reference.check_error(dm, usual, expected)
    reference.check_error(dm[:5], usual[:5], expected[:5])


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "autocast"), [("dora", False), ("dora", True), ("lora", False)])
def test_small_updates_survive_half_precision(dtype, method, autocast):
    """Of an update of 4e-4 of the weight, rounding W' to bf16 would keep a quarter (facts: 0.23)."""
    rank = 16
    W0, adapter = make(1024, 256, rank, dtype=torch.float32, scaling=1.0, size=4e-4 / rank**0.5)
    W0 = W0.to(dtype).float() if autocast else W0.to(dtype)
    adapter = adapter._replace(magnitude=dora.row_norm(W0) * (1 + 1e-4) if method == "dora" else None)
    tokens = 4096 if dtype == torch.bfloat16 else 512
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        y = adapted_product(x, W0, None, [adapter], Options())
        base = F.linear(x, W0)
    assert y.dtype == base.dtype == dtype
    W = reference.merged_weight(W0, adapter)
    update = x.double() @ (W - W0.double()).T
    share = (((y.double() - x.double() @ W0.double().T) * update).sum() / update.square().sum()).item()
    assert abs(share - 1) <= 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    W0, adapter = make(48, 64, 4, dtype=torch.float32, size=0.05)
    W0, x = W0.to(dtype), torch.randn(5, 40, 64).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype)
    dY = torch.randn(5, 40, 48).to(dtype)
    for _, variant in variants(adapter):
        y = adapted_product(x, W0, bias, [variant], Options())
        trained = [t for t in variant[:3] if t is not None]
        exact_x = x.detach().double().requires_grad_()
        exact = exact_x @ reference.merged_weight(W0, variant).T + bias.double()
        usual = F.linear(x, reference.merged_weight(W0, variant, torch.float32).to(dtype), bias)
        reference.check_error(y, usual, exact)
        outputs = (y, x), (usual, x), (exact, exact_x)
        gradients = [torch.autograd.grad(of, (by, *trained), dY.to(of)) for of, by in outputs]
        reference.check_errors(*map(reference.numbered, gradients), dtype=dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_in_half_precision_takes_a_product_with_rank_more_columns(dropout):
    """Neither twice the input nor W(t) is made, and nothing but x, h and parameters is kept."""
    W0, adapter = make(48, 32, 4, dtype=torch.float32)
    W0, x = W0.bfloat16(), torch.randn(64, 32).bfloat16().requires_grad_()
    with reference.NewTensors() as allocated:
        y = adapted_product(x, W0, None, [adapter._replace(magnitude=None)], Options(dropout=dropout))
        y.sum().backward()
    assert {(64, 40), (48, 40)} <= set(allocated.shapes)
    assert not {(64, 64), (48, 64)} & set(allocated.shapes)
    sizes = saved_sizes(lambda: product(x, W0, None, [adapter._replace(magnitude=None)], "unmerged"))
    assert sizes == [48 * 32, 64 * 32, 64 * 48]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 8), (8,)])
def test_few_or_no_tokens(shape):
    for dtype in (torch.float32, torch.bfloat16):
        W0, adapter = make(5, 8, 2, dtype=torch.float32)
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = adapted_product(x, W0.to(dtype), None, [adapter], Options())
        assert y.shape == (*shape[:-1], 5)
        y.float().sum().backward()
        assert x.grad.shape == x.shape
        assert adapter.B.grad.isfinite().all()


# --- training ---


def losses_of_twenty_steps(product, tokens, dtype=torch.float32):
    """SGD on a layer of 48 x 64. The reference is the formula in float64."""
    W0, adapter = make(48, 64, 4, dtype=torch.float32, scaling=1.0, size=0.2)
    g = torch.Generator().manual_seed(5)
    x = (torch.randn(tokens, 64, generator=g) / 8).to(dtype)  # for outputs, and losses, of about 1
    target = torch.randn(tokens, 48, generator=g).to(dtype)
    bias = torch.randn(48, generator=g).to(dtype)
    trained = [t.detach().to(dtype).requires_grad_() for t in adapter[:3]]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(20):
        A, B, m = trained
        y = product(x, W0.to(dtype), bias, adapter._replace(A=A, B=B, magnitude=m))
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tokens", [30, 200, 600])
@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_of_training(form, tokens):
    expected = losses_of_twenty_steps(expected_product, tokens, torch.float64)

    def run(x, W0, bias, adapter):
        return product(x, W0, bias, [adapter], form)

    def in_float32(*args):
        return expected_product(*args, torch.float32)

    found, usual = losses_of_twenty_steps(run, tokens), losses_of_twenty_steps(in_float32, tokens)
    assert found[-1] < 0.99 * found[0]
    reference.check_error(torch.tensor(found), torch.tensor(usual), torch.tensor(expected, dtype=torch.float64))


# --- many rows ---


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize(
    ("base", "shape"), [("bfloat16", (700, 24)), ("float32", (512, 6, 3, 3)), ("float16", (1000, 8))]
)
def test_a_weight_in_half_precision_is_built_in_blocks_of_rows(base, shape, has_dropout):
    """As it is built at once, but for the order of summation in products: n and g are those of V in float64."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=g).to(getattr(torch, base))
    B, A = torch.randn(shape[0], 3, generator=g), torch.randn(3, *shape[1:], generator=g)
    adapters = [dora.Adapter(A, B, 1.1 * dora.row_norm(weight), 0.5), dora.Adapter(A, B, None, 0.5, 0.7)]
    dtype = torch.bfloat16 if base == "float32" else weight.dtype
    parts, rows = merged_parts(weight, adapters, None, dtype, has_dropout)
    W, expected_rows = dora.merge_adapters(weight, adapters)
    expected = split_weight(W, weight, dtype, has_dropout)
    exact = sum(reference.merged_weight(weight, adapter) for adapter in adapters) - weight.double()
    reference.check_error(*(main.float() + rest.float() for main, rest in (parts, expected)), exact, dtype=dtype)
    assert all(part.dtype == dtype for part in parts)
    V = reference.merged_weight(weight, adapters[1]._replace(strength=1.0)).flatten(1)
    usual = (weight.float().flatten(1) + 0.5 * B @ A.flatten(1)).norm(dim=1)
    for found in (rows, expected_rows):
        reference.check_error(found[0].norm, usual, V.norm(dim=1))
        assert found[1] is None
    known, again = merged_parts(weight, adapters, rows, dtype, has_dropout)
    assert again is rows
    assert all(map(torch.equal, known, parts))


def test_a_fresh_adapter_on_many_rows_of_half_precision_changes_no_bit():
    layer = nn.Linear(40, 601).bfloat16()
    x = torch.randn(300, 40).bfloat16()
    before = layer(x)
    adapt_layer(layer, DoRASpec(rank=4))
    assert torch.equal(layer(x), before)

"""The formulas against float64 and autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.core import functional as dora
from dora_mm.core.functional import Adapter
from tests.core import reference


def make(out, inner, rank, *, dtype=torch.float64, seed=0, size=0.3, scaling=1.7, strength=1.0, norm_grad="detached"):
    g = torch.Generator().manual_seed(seed)
    W0 = torch.randn(out, inner, generator=g, dtype=dtype)
    A = torch.randn(rank, inner, generator=g, dtype=dtype).requires_grad_()
    B = (size * torch.randn(out, rank, generator=g, dtype=dtype)).requires_grad_()
    m = (W0.norm(dim=1) * (1 + 0.2 * torch.randn(out, generator=g, dtype=dtype))).requires_grad_()
    return W0, Adapter(A, B, m, scaling, strength, norm_grad)


def variants(adapter):
    yield "dora", adapter
    yield "lora", adapter._replace(magnitude=None)
    yield "magnitude", adapter._replace(A=None, B=None)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 17),
    inner=st.integers(1, 17),
    rank=st.integers(1, 5),
    strength=st.sampled_from([1.0, 0.5, -1.0, 1e-5]),
    norm_grad=st.sampled_from(["detached", "exact"]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_autograd_of_the_formula(out, inner, rank, strength, norm_grad, seed):
    W0, adapter = make(out, inner, rank, strength=strength, norm_grad=norm_grad, seed=seed)
    dY = torch.randn(out, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    for _, variant in variants(adapter):
        wanted = [t for t in variant[:3] if t is not None]
        found = dora.merged_weight(W0, [variant])
        expected = reference.merged_weight(W0, variant)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad(found, wanted, dY), torch.autograd.grad(expected, wanted, dY), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * abs(strength) * (1 + b.abs().max().item()))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_gradcheck_in_exact_mode(strength):
    W0, adapter = make(5, 7, 3, norm_grad="exact", strength=strength)
    bias = torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def layer(x, A, B, m):
        return dora.dora_linear(x, W0, bias, [adapter._replace(A=A, B=B, magnitude=m)])

    assert torch.autograd.gradcheck(layer, (x, adapter.A, adapter.B, adapter.magnitude))


def test_gradcheck_of_input_and_magnitude_in_detached_mode():
    W0, adapter = make(5, 7, 3)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def layer(x, m):
        return dora.dora_linear(x, W0, None, [adapter._replace(magnitude=m)])

    assert torch.autograd.gradcheck(layer, (x, adapter.magnitude))


def test_several_adapters_add_up():
    W0, one = make(6, 8, 2, seed=1, strength=0.7)
    _, two = make(6, 8, 3, seed=2, strength=-0.4)
    together = dora.merged_weight(W0, [one, two])
    expected = reference.merged_weight(W0, one) + reference.merged_weight(W0, two) - W0
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(together.sum(), (one.B, two.B))
    for grad, adapter in zip(grads, (one, two), strict=True):
        (alone,) = torch.autograd.grad(reference.merged_weight(W0, adapter).sum(), adapter.B)
        torch.testing.assert_close(grad, alone, rtol=1e-9, atol=1e-10)


# --- norms ---


def norm_of(W0, delta):
    return dora.updated_norm(W0, delta, dora.row_norm(W0), torch.empty_like(W0))


@pytest.mark.parametrize("shape", [(48, 36), (333, 77), (1280, 640)])
@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e18])
def test_norm_equals_n0_bit_for_bit_without_an_update(shape, scale):
    W0 = scale * torch.randn(shape)
    assert torch.equal(norm_of(W0, torch.zeros_like(W0)), dora.row_norm(W0))


def test_norm_equals_n0_where_the_square_root_is_inexact():
    W0 = torch.rand(1_000_000, 1) + 0.5
    assert torch.equal(norm_of(W0, torch.zeros_like(W0)), W0[:, 0])


@pytest.mark.parametrize("residual", [0.3, 0.1, 1e-2, 1e-3, 1e-4])
def test_norm_where_the_update_nearly_cancels_the_weight(residual):
    W0, rest = torch.randn(64, 256), torch.randn(64, 256)
    delta = -W0 + residual * rest
    expected = (W0.double() + delta.double()).norm(dim=1)
    assert reference.relative_error(norm_of(W0, delta), expected) < 1e-6


def test_half_precision_squares_do_not_overflow():
    W0 = torch.full((3, 64), 300.0, dtype=torch.float16)
    assert torch.equal(dora.row_norm(W0), torch.full((3,), 2400.0))


def test_zero_rows_are_no_ops_and_stay_finite():
    W0, adapter = make(4, 6, 2, norm_grad="exact")
    W0[1] = 0
    with torch.no_grad():
        adapter.magnitude[1] = 0
        adapter.B[1] = 0
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = dora.dora_linear(x, W0, None, [adapter])
    y.square().sum().backward()
    assert torch.equal(y[:, 1], torch.zeros(3, dtype=torch.float64))
    assert all(t.grad.isfinite().all() for t in (x, adapter.A, adapter.B, adapter.magnitude))


@pytest.mark.parametrize("magnitude", [0.0, -1.0])
def test_zero_and_negative_magnitudes(magnitude):
    W0, adapter = make(4, 6, 2)
    adapter = adapter._replace(magnitude=torch.full((4,), magnitude, dtype=torch.float64, requires_grad=True))
    x = torch.randn(3, 6, dtype=torch.float64)
    y = dora.dora_linear(x, W0, None, [adapter])
    torch.testing.assert_close(y, x @ reference.merged_weight(W0, adapter).T)
    (dm,) = torch.autograd.grad(y.sum(), adapter.magnitude)
    (expected,) = torch.autograd.grad((x @ reference.merged_weight(W0, adapter).T).sum(), adapter.magnitude)
    torch.testing.assert_close(dm, expected)


# --- precision ---


def test_magnitude_gradient_under_a_large_bias():
    """dm is never taken from y - b: a bias of 100 costs it nothing."""
    W0, adapter = make(64, 96, 4, dtype=torch.float32, size=0.05)
    x, dY = torch.randn(200, 96), torch.randn(200, 64)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        y = dora.dora_linear(x.to(dtype), W0.to(dtype), torch.full((64,), 100.0, dtype=dtype), [adapter])
        (dm,) = torch.autograd.grad(y, adapter.magnitude, dY.to(dtype))
        exact = x.to(dtype).double() @ reference.merged_weight(W0.to(dtype), adapter).T
        (expected,) = torch.autograd.grad(exact, adapter.magnitude, dY.to(dtype).double())
        assert reference.relative_error(dm, expected) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_small_updates_survive_half_precision(dtype, autocast):
    """Of an update of 4e-4 of the weight, rounding W' to bf16 would keep a quarter (facts: 0.23)."""
    rank = 16
    W0, adapter = make(1024, 256, rank, dtype=torch.float32, scaling=1.0, size=4e-4 / rank**0.5)
    W0 = W0.to(dtype).float() if autocast else W0.to(dtype)
    adapter = adapter._replace(magnitude=dora.row_norm(W0) * (1 + 1e-4))
    tokens = 4096 if dtype == torch.bfloat16 else 512
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        y = dora.dora_linear(x, W0, None, [adapter])
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
    y = dora.dora_linear(x, W0, bias, [adapter])
    wanted = (x, adapter.A, adapter.B, adapter.magnitude)
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x @ reference.merged_weight(W0, adapter).T + bias.double()
    expected = torch.autograd.grad(exact, (exact_x, *wanted[1:]), dY.double())
    unit = torch.finfo(dtype).eps
    assert reference.relative_error(y, exact) < unit
    for found, right in zip(torch.autograd.grad(y, wanted, dY), expected, strict=True):
        assert reference.relative_error(found, right) < unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_the_base_alone(dtype):
    """One mask on x, in the update only, rounded once: x W0' + drop(x) (W' - W0)' + b."""
    W0, adapter = make(48, 32, 4, dtype=torch.float32)
    W0, x, bias = W0.to(dtype), torch.randn(64, 32).to(dtype), torch.randn(48).to(dtype)
    torch.manual_seed(5)
    y = dora.dora_linear(x, W0, bias, [adapter], dropout=0.4)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    W = reference.merged_weight(W0, adapter)
    expected = x.double() @ W0.double().T + dropped.double() @ (W - W0.double()).T + bias.double()
    assert y.dtype == dtype
    assert reference.relative_error(y, expected) < 4 * torch.finfo(dtype).eps
    y.float().sum().backward()
    (exact,) = torch.autograd.grad(expected.sum(), adapter.B)
    assert reference.relative_error(adapter.B.grad, exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 8), (8,)])
def test_few_or_no_tokens(shape):
    for dtype in (torch.float32, torch.bfloat16):
        W0, adapter = make(5, 8, 2, dtype=torch.float32)
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = dora.dora_linear(x, W0.to(dtype), None, [adapter])
        assert y.shape == (*shape[:-1], 5)
        y.float().sum().backward()
        assert x.grad.shape == x.shape
        assert adapter.B.grad.isfinite().all()

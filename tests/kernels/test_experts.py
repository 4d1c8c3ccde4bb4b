"""The kernels of stacks of matrices against float64, by the rule of tests/kernels/test_kernels.py."""

import pytest
import torch

pytest.importorskip("triton")

from dora_mm.core import Adapter
from dora_mm.core.forms import TORCH
from dora_mm.core.functional import row_norm, updated_norm
from dora_mm.core.ops import BatchedOp, GroupedOp
from dora_mm.core.passes import Options, PassCache
from dora_mm.kernels.common import padded_rank
from dora_mm.kernels.dora_linear import TRITON, runs_in_triton
from dora_mm.kernels.grouped_dots import grouped_dots
from dora_mm.kernels.grouped_matmul import TILE_MANY, grouped_matmul, tile_for
from dora_mm.kernels.grouped_norm import grouped_norm
from dora_mm.kernels.grouped_outer import grouped_outer
from tests.kernels.test_kernels import DEVICE, DTYPES, assert_as_good_as, random
from tests.shared import reference

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
NUM_OUT, NUM_IN, NUM_EXPERTS = 24, 70, 4
COUNTS = [[0, 1, 65, 2], [0, 68, 0, 0], [0] * NUM_EXPERTS]  # rows of each expert


def ends_of(counts, dtype=torch.int32):
    return torch.tensor(counts).cumsum(0).to(DEVICE, dtype)


def each(ends, *tensors):
    """The parts of stacks (E, ..) and of rows (S, ..) that belong together, as float64."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = [t if t.dim() == 3 or len(t) == len(ends) else t.split(counts) for t in tensors]
    return [[p.double() for p in one] for one in zip(*parts, strict=True)]


def product(x, W, h, B, gain, ends):
    return torch.cat([g * (a @ w.T + (0.7 * c) @ b.T) for a, w, c, b, g in each(ends, x, W, h, B, gain)])


@pytest.mark.parametrize(("counts", "transposed"), [(COUNTS[0], True), (COUNTS[1], False), (COUNTS[2], False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype, counts, transposed):
    rank, rows = 5, sum(counts)
    ends, x, dY = ends_of(counts), random(rows, NUM_IN, dtype=dtype), random(rows, NUM_OUT, dtype=dtype, seed=6)
    W = random(NUM_EXPERTS, NUM_OUT, NUM_IN, dtype=dtype, seed=1)
    W = W.mT.contiguous().mT if transposed else W
    A, B = random(NUM_EXPERTS, rank, NUM_IN, seed=2), random(NUM_EXPERTS, NUM_OUT, rank, seed=3)
    gain = random(NUM_EXPERTS, NUM_OUT, seed=4)
    h = grouped_matmul(x, A, ends, num_columns=padded_rank(rank))
    y = grouped_matmul(x, W, ends, gain=gain, h=h, B=B, scaling=0.7)
    assert h.shape == (rows, 16)
    assert y.shape == (rows, NUM_OUT)
    if not rows:
        return
    assert h[:, rank:].count_nonzero() == 0
    exact = torch.cat([a @ w.T for a, w in each(ends, x, A.to(dtype))])
    assert_as_good_as(h[:, :rank], exact.to(dtype), exact)
    rounded = (0.7 * B).to(dtype).double() / 0.7
    exact = product(x, W, h[:, :rank], rounded, gain, ends)
    assert_as_good_as(y, exact.to(dtype), exact)
    u = grouped_matmul(dY, B.mT, ends, gain=gain, gain_in=True, factor=0.7, num_columns=padded_rank(rank))
    scaled = torch.cat([(d * g).float() for d, g in each(ends, dY, gain)]).to(dtype)
    exact = torch.cat([0.7 * d @ b for d, b in each(ends, scaled, B.to(dtype))])
    assert_as_good_as(u[:, :rank], exact.to(dtype), exact)
    dX = grouped_matmul(dY, W.mT, ends, gain=gain, gain_in=True, h=u, B=A.mT)
    parts = each(ends, scaled, W, u[:, :rank], A.to(dtype))
    exact = torch.cat([d @ w + c @ a for d, w, c, a in parts])
    assert_as_good_as(dX, exact.to(dtype), exact)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_the_rows_of_each_expert(dtype, counts):
    rank, rows = 20, sum(counts)
    ends, b, gain = ends_of(counts, torch.int64), random(rows, NUM_OUT, dtype=dtype), random(NUM_EXPERTS, NUM_OUT)
    a = random(rows, padded_rank(rank), dtype=dtype, seed=1)
    out = torch.full((NUM_EXPERTS, NUM_OUT, rank), torch.nan, device=DEVICE)
    assert grouped_outer(a, b, ends, out.mT, gain=gain, factor=0.5).data_ptr() == out.data_ptr()
    exact = torch.stack([0.5 * g[:, None] * (d.T @ c[:, :rank]) for c, d, g in each(ends, a, b, gain)])
    assert (out - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, rank):
    """One row has no weight, one no update; in one the update nearly cancels the weight."""
    W0 = random(3, NUM_OUT, NUM_IN, dtype=dtype)
    A, B = random(3, rank, NUM_IN, seed=1), 0.3 * random(3, NUM_OUT, rank, seed=2)
    W0[0, 3], B[1, 4] = 0, 0
    W0[2, 5] = (-0.7 * B[2, 5] @ A[2] * 1.001).to(dtype)
    n0 = torch.stack([row_norm(one) for one in W0])
    m, gram = n0 * 1.1, A @ A.mT
    norm, gain = grouped_norm(W0, gram, A, B, 0.7, n0, m)
    exact = (W0.double() + 0.7 * B.double() @ A.double()).norm(dim=2)
    plain = torch.stack([updated_norm(w.float(), a, b, 0.7, n) for w, a, b, n in zip(W0, A, B, n0, strict=True)])
    assert_as_good_as(norm, plain, exact)
    assert (norm[2, 5] - exact[2, 5]).abs() <= 1e-3 * exact[2, 5]
    assert torch.equal(gain, m / norm)
    again, _ = grouped_norm(W0.mT.contiguous().mT, gram, A, B, 0.7, None, m)  # n0 in the same pass
    assert reference.relative_error(again, norm) < 3e-7
    norm, gain = grouped_norm(W0, gram, A, torch.zeros_like(B), 0.7, n0, n0)
    assert torch.equal(norm, n0)
    assert torch.equal(gain, torch.ones_like(gain))


@pytest.mark.parametrize("has_output", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_magnitudes(dtype, has_output):
    """Row 1 of each expert has a small gain, so that y has lost it; the norm of row 3 is 0."""
    ends, rank = ends_of(COUNTS[0]), 5
    x, dY = random(68, NUM_IN, dtype=dtype), random(68, NUM_OUT, dtype=dtype, seed=1)
    W0, B = random(NUM_EXPERTS, NUM_OUT, NUM_IN, seed=2), random(NUM_EXPERTS, NUM_OUT, rank, seed=3)
    W0[:, 3], B[:, 3] = 0, 0
    W0, h = W0.to(dtype), random(68, 16, dtype=dtype, seed=4)
    h[:, rank:] = 0
    norm = 1 + random(NUM_EXPERTS, NUM_OUT, seed=5).abs()
    gain = torch.full_like(norm, 1.1)
    norm[:, 3], gain[:, 1] = 0, 1e-9
    y = product(x, W0, h[:, :rank], (0.7 * B).to(dtype).double() / 0.7, gain, ends).to(dtype) if has_output else None
    dm = grouped_dots(dY, y, x, W0, h, B, gain * norm, norm, gain, 0.7, ends)
    parts = each(ends, dY, x, W0, h[:, :rank], (0.7 * B).to(dtype).double() / 0.7, norm)
    exact = torch.stack([(d * (a @ w.T + 0.7 * c @ b.T)).sum(0) / n for d, a, w, c, b, n in parts])
    exact[:, 3] = 0
    assert (dm - exact).norm() <= (4 * torch.finfo(dtype).eps if has_output else 2e-6) * exact.norm()


def given(dtype, method, transposed=False):
    """x, W0, an adapter and dY."""
    rows, rank, scaling = sum(COUNTS[0]), 5, 0.7
    x, dY = random(rows, NUM_IN, dtype=dtype), random(rows, NUM_OUT, dtype=dtype, seed=1)
    W0 = random(NUM_EXPERTS, NUM_OUT, NUM_IN, dtype=dtype, seed=2)
    W0 = W0.mT.contiguous().mT if transposed else W0
    A, B = random(NUM_EXPERTS, rank, NUM_IN, seed=3), 0.3 * random(NUM_EXPERTS, NUM_OUT, rank, seed=4)
    m = W0.float().norm(dim=2) * (1 + random(NUM_EXPERTS, NUM_OUT, seed=5).abs())
    m[2, :3] = torch.tensor([0.0, 1e-20, -1e-3])
    A, B, m = (
        None if method == "magnitude" else A,
        None if method == "magnitude" else B,
        m if method != "lora" else None,
    )
    A, B, m = (t if t is None else t.requires_grad_() for t in (A, B, m))
    return x.requires_grad_(), W0, Adapter(A, B, m, scaling), dY


def trained(x, adapter):
    return [t for t in (x, adapter.A, adapter.B, adapter.magnitude) if t is not None]


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(dtype, method):
    x, W0, adapter, dY = given(dtype, method, transposed=method == "dora")
    kind = GroupedOp(ends_of(COUNTS[0]), BatchedOp(method == "lora"))
    assert runs_in_triton(W0, [adapter], Options(kind))
    found, others = (
        (y.detach(), *torch.autograd.grad(y, trained(x, adapter), dY))
        for y in (forward(x, W0, None, [adapter], Options(kind)) for forward in (TRITON, TORCH))
    )
    exact_x, own = (
        x.detach().double().requires_grad_(),
        adapter.with_tensors(*(None if t is None else t.detach().double().requires_grad_() for t in adapter[:3])),
    )
    W = [reference.merged_weight(w, a) for w, a in zip(W0.double(), own.of_matrices(NUM_EXPERTS), strict=True)]
    y = torch.cat([a @ w.T for a, w in zip(exact_x.split(COUNTS[0]), W, strict=True)])
    exact = y, *torch.autograd.grad(y, trained(exact_x, own), dY.double())
    for a, b, right in zip(found, others, exact, strict=True):
        assert a.dtype == b.dtype
        assert a.is_contiguous()
        if dtype == torch.float32:
            assert_as_good_as(a, b, right)
        else:  # A, s B and g dY are rounded to the dtype of the operands: one more rounding
            assert reference.relative_error(a, right) < 2 * torch.finfo(dtype).eps


def test_an_output_may_be_overwritten():
    """dm is then computed by a product with V."""
    x, W0, adapter, dY = given(torch.float32, "dora")
    options = Options(GroupedOp(ends_of(COUNTS[0])))
    found, expected = (
        torch.autograd.grad(forward(x, W0, None, [adapter], options).relu_(), trained(x, adapter), dY)
        for forward in (TRITON, TORCH)
    )
    for a, b in zip(found, expected, strict=True):
        assert reference.relative_error(a, b) < 1e-5


def test_norms_are_computed_once_and_shared(monkeypatch):
    x, W0, adapter, _ = given(torch.float32, "dora")
    cache = PassCache(keeps_base=True)
    options = Options(GroupedOp(ends_of(COUNTS[0])), cache=cache)
    first = TRITON(x, W0, None, [adapter], options)
    assert torch.equal(cache.n0, torch.stack([row_norm(w) for w in W0]))
    monkeypatch.setattr("dora_mm.kernels.dora_experts.grouped_norm", None)
    assert torch.equal(TRITON(x, W0, None, [adapter], options), first)


def test_an_untrained_adapter_leaves_the_output_as_it_is():
    x, W0, adapter, _ = given(torch.float16, "dora")
    fresh = Adapter(adapter.A, torch.zeros_like(adapter.B), torch.stack([row_norm(w) for w in W0]))
    options = Options(GroupedOp(ends_of(COUNTS[0])), cache=PassCache(keeps_base=True), is_inference=True)
    with torch.no_grad():
        assert torch.equal(TRITON(x, W0, None, [fresh], options), grouped_matmul(x, W0, options.op.ends))


@pytest.mark.parametrize(
    "change", [{"strength": 0.5}, {"norm_grad": "exact"}, {"number": 2}, {"dtype": torch.float64}, {"dropout": 0.5}]
)
def test_what_has_no_kernel_runs_in_plain_torch(change):
    _, W0, adapter, _ = given(change.get("dtype", torch.float32), "dora")
    own = adapter._replace(**{k: v for k, v in change.items() if k in Adapter._fields})
    options = Options(GroupedOp(ends_of(COUNTS[0])), dropout=change.get("dropout", 0.0))
    assert not runs_in_triton(W0, [own] * change.get("number", 1), options)


def test_tiles_are_no_wider_than_what_they_compute():
    few, many = torch.empty(100, 64, dtype=torch.float16), torch.empty(1000, 64, dtype=torch.float16)
    assert tile_for(many, 4, 256) == TILE_MANY
    assert tile_for(few, 4, 256)["BLOCK_M"] == 32
    assert [tile_for(few, 4, columns)["BLOCK_N"] for columns in (16, 48, 64)] == [16, 64, 64]

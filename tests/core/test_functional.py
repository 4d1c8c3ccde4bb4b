"""The formulas against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.core import functional as dora
from tests.shared import reference
from tests.shared.reference import make, variants


@settings(max_examples=40)
@given(
    out=st.integers(1, 17),
    inner=st.integers(1, 17),
    rank=st.integers(1, 5),
    strength=st.sampled_from([1.0, 0.5, -1.0, 1e-5]),
    seed=st.integers(0, 1000),
)
def test_merged_weight_is_the_formula(out, inner, rank, strength, seed):
    W0, adapter = make(out, inner, rank, strength=strength, seed=seed)
    for _, variant in variants(adapter):
        found, expected = dora.merged_weight(W0, [variant]), reference.merged_weight(W0, variant)
        reference.check_error(found, expected, expected)


def norm_of(W0, A, B, scaling=1.0):
    return dora.updated_norm(W0, A, B, scaling, dora.row_norm(W0))


@pytest.mark.parametrize("shape", [(48, 36), (333, 77), (1280, 640)])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_norm_equals_n0_bit_for_bit_without_an_update(shape, scale):
    W0 = scale * torch.randn(shape)
    assert torch.equal(norm_of(W0, torch.randn(4, shape[1]), torch.zeros(shape[0], 4)), dora.row_norm(W0))


def test_norm_equals_n0_where_the_square_root_is_inexact():
    W0 = torch.rand(1_000_000, 1) + 0.5
    assert torch.equal(norm_of(W0, torch.randn(1, 1), torch.zeros(1_000_000, 1)), W0[:, 0])


@pytest.mark.parametrize("residual", [0.5, 0.4, 0.3, 0.1, 1e-2, 1e-3, 1e-4])
def test_norm_where_the_update_nearly_cancels_the_weight(residual):
    """W0 = -s B A + residual: the factored sum alone has no digits left at 1e-4."""
    A, B = torch.randn(8, 256), torch.randn(64, 8)
    W0 = -0.5 * B @ A + residual * torch.randn(64, 256)
    expected = (W0.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    reference.check_error(norm_of(W0, A, B, 0.5), (W0 + 0.5 * B @ A).norm(dim=1), expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_norm_of_small_and_large_updates(size):
    W0, A, B = torch.randn(64, 256), torch.randn(8, 256), size * torch.randn(64, 8)
    expected = (W0.double() + B.double() @ A.double()).norm(dim=1)
    reference.check_error(norm_of(W0, A, B), (W0 + B @ A).norm(dim=1), expected)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-20, 1e-12])
def test_norm_of_rows_that_are_tiny_compared_to_their_update(size):
    W0, A, B = size * torch.randn(64, 256), torch.randn(8, 256), torch.randn(64, 8)
    W0[::2] = torch.randn(32, 256)
    expected = (W0.double() + B.double() @ A.double()).norm(dim=1)
    reference.check_error(norm_of(W0, A, B), (W0 + B @ A).norm(dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_norm_of_a_weight_in_half_precision(dtype, scaling):
    """A and B stay in float32: what of them is rounded for the product with the weight is added in a second one."""
    W0, A, B = torch.randn(64, 256).to(dtype), torch.randn(8, 256), torch.randn(64, 8)
    expected = (W0.double() + scaling * B.double() @ A.double()).norm(dim=1)
    found = dora.updated_norm(W0, A, B, scaling, dora.row_norm(W0))
    reference.check_error(found, (W0.float() + scaling * B @ A).norm(dim=1), expected)


@pytest.mark.parametrize(
    ("change", "regular"),
    [({}, True), ({"m": 0.0}, False), ({"m": -1.0}, False), ({"m": 1e-3}, False), ({"W0": 0.0}, False)],
)
def test_rows_are_regular_where_no_norm_is_zero_and_no_gain_is_small(change, regular):
    W0 = torch.randn(6, 8)
    m = dora.row_norm(W0)
    W0[2] *= change.get("W0", 1.0)
    m[3] *= change.get("m", 1.0)
    rows = dora.row_gains(W0, dora.Adapter(torch.randn(2, 8), torch.zeros(6, 2), m))
    assert rows.regular == regular
    assert rows.gain.isfinite().all()


def test_half_precision_squares_do_not_overflow():
    W0 = torch.full((3, 64), 300.0, dtype=torch.float16)
    assert torch.equal(dora.row_norm(W0), torch.full((3,), 2400.0))

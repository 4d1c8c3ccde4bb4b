"""Adapters of fused projections against the product that they stand for, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.fused import fuse, split, split_rows, stack_rows, untouched
from dora_mm.formats.naming.names import ModuleGroup, Name
from dora_mm.formats.state import LayerState

QKV = ModuleGroup(tuple(Name("transformer", f"to_{x}") for x in "qkv"))
FLUX_SINGLE = ModuleGroup(tuple(Name("transformer", x) for x in ("to_q", "to_k", "to_v", "proj_mlp")))
SHIFT_SCALE = ModuleGroup((Name("transformer", "norm_out.linear"),), modulation=True)


def adapter(out_features, in_features, rank, alpha, seed, dora=True):
    torch.manual_seed(seed)
    A, B = (torch.randn(*size, dtype=torch.float64) for size in ((rank, in_features), (out_features, rank)))
    tensors = {"lora_A": A, "lora_B": B}
    if dora:
        tensors["magnitude"] = torch.rand(out_features, dtype=torch.float64)
    return LayerState(DoRASpec(rank, alpha, method="dora" if dora else "lora"), tensors)


def update(layer):
    A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
    return layer.spec.alpha / A.shape[0] * B @ A


def dora(layer, weight):
    V = weight + update(layer)
    return layer.tensors["magnitude"][:, None] * V / V.norm(dim=1, keepdim=True)


def same(a, b):
    return (
        a.spec == b.spec
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    )


settings = st.tuples(st.integers(1, 6), st.sampled_from([0.5, 1.0, 4.0, 16.0]))


@given(
    st.integers(1, 9), st.integers(1, 9), st.lists(settings, min_size=3, max_size=3), st.booleans(), st.integers(0, 99)
)
def test_fused_is_what_the_parts_compute(out_features, in_features, ranks, with_magnitude, seed):
    parts = [
        adapter(out_features, in_features, rank, alpha, seed + i, with_magnitude)
        for i, (rank, alpha) in enumerate(ranks)
    ]
    fused = fuse(QKV, parts)
    assert fused.tensors["lora_A"].shape[0] == sum(rank for rank, _ in ranks)
    torch.testing.assert_close(update(fused), torch.cat([update(part) for part in parts]))
    if with_magnitude:
        weights = [torch.randn(out_features, in_features, dtype=torch.float64) for _ in parts]
        expected = torch.cat([dora(part, weight) for part, weight in zip(parts, weights, strict=True)])
        torch.testing.assert_close(dora(fused, stack_rows(QKV, weights)), expected)
    for part, back in zip(parts, split(QKV, fused), strict=True):
        torch.testing.assert_close(update(back), update(part))
        assert back.tensors["lora_A"].shape == part.tensors["lora_A"].shape  # each part gets its rank back


def test_equal_settings_come_back_bit_for_bit():
    parts = [adapter(4, 6, 2, 1.0, seed) for seed in range(3)]
    fused = fuse(QKV, parts)
    assert fused.spec.alpha == 3.0
    assert all(map(same, split(QKV, fused), parts))


@pytest.mark.parametrize("with_magnitude", [True, False])
def test_a_fused_adapter_of_another_tool_comes_back_bit_for_bit(with_magnitude):
    fused = adapter(12, 6, 3, 2.0, 0, with_magnitude)
    parts = split(QKV, fused)
    assert [part.tensors["lora_A"].shape for part in parts] == [(3, 6)] * 3  # A is shared
    torch.testing.assert_close(torch.cat([update(part) for part in parts]), update(fused))
    assert same(fuse(QKV, parts), fused)
    zero = LayerState(DoRASpec(3, 2.0, method="lora"), {**fused.tensors, "lora_B": torch.zeros(12, 3)})
    zero.tensors.pop("magnitude", None)
    assert same(fuse(QKV, split(QKV, zero)), zero)


def test_the_mlp_of_flux_is_stacked_below():
    parts = [adapter(8, 8, 2, 2.0, seed) for seed in range(3)] + [adapter(32, 8, 2, 2.0, 3)]
    fused = fuse(FLUX_SINGLE, parts)
    assert fused.tensors["lora_B"].shape == (56, 8)
    assert all(map(same, split(FLUX_SINGLE, fused), parts))
    with pytest.raises(ValueError, match=r"stacked in 72 rows of 8, .* name the base model"):
        split(FLUX_SINGLE, adapter(72, 8, 2, 2.0, 0))


def test_shift_and_scale_change_places_with_their_magnitudes():
    part = adapter(16, 8, 2, 2.0, 0)
    (swapped,) = split(SHIFT_SCALE, part)
    assert torch.equal(swapped.tensors["lora_B"], torch.cat(part.tensors["lora_B"].chunk(2)[::-1]))
    assert torch.equal(swapped.tensors["magnitude"], torch.cat(part.tensors["magnitude"].chunk(2)[::-1]))
    assert same(fuse(SHIFT_SCALE, [swapped]), part)
    six = adapter(48, 8, 2, 2.0, 0)  # the six values of a block are in the same order everywhere
    assert same(split(SHIFT_SCALE, six)[0], six)
    weight = torch.randn(16, 8)
    assert torch.equal(stack_rows(SHIFT_SCALE, split_rows(SHIFT_SCALE, weight)), weight)


def test_a_part_that_is_not_adapted_stays_as_it_is():
    weight = torch.randn(12, 6, dtype=torch.float64)
    norms = weight.norm(dim=1)
    parts = [adapter(4, 6, 2, 2.0, 0), untouched(4, 6, norms[4:8]), untouched(4, 6, norms[8:])]
    merged = dora(fuse(QKV, parts), weight)
    torch.testing.assert_close(merged[:4], dora(parts[0], weight[:4]))
    torch.testing.assert_close(merged[4:], weight[4:])


def test_what_cannot_be_fused():
    whole = [adapter(4, 6, 2, 2.0, seed) for seed in range(3)]
    with pytest.raises(
        ValueError, match=r"of transformer.to_q and the projections fused with it, only some have a magn"
    ):
        fuse(QKV, [*whole[:2], untouched(4, 6)])
    with pytest.raises(ValueError, match="different widths"):
        fuse(QKV, [*whole[:2], adapter(4, 5, 2, 2.0, 0)])
    with pytest.raises(ValueError, match="cannot share 13 rows"):
        split(QKV, adapter(13, 6, 2, 2.0, 0))

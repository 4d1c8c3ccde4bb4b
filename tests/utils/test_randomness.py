"""Batches and generators as functions of the seed and the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.utils.randomness import batch_of_groups, generator


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
def test_grouped_epochs_are_complete_and_never_mixed(sizes, batch_size, seed, epoch):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    per_epoch = sum(-(-size // batch_size) for size in sizes)
    all_batches = [batch_of_groups(groups, batch_size, epoch * per_epoch + n, seed) for n in range(per_epoch)]
    assert sorted(row for batch in all_batches for row in batch) == list(range(sum(sizes)))
    assert all(any(set(batch) <= set(group) for group in groups) for batch in all_batches)


def test_generators_depend_on_each_argument():
    base = torch.rand(4, generator=generator(1, 2, "a"))
    assert torch.equal(base, torch.rand(4, generator=generator(1, 2, "a")))
    for other in (generator(2, 2, "a"), generator(1, 3, "a"), generator(1, 2, "b")):
        assert not torch.equal(base, torch.rand(4, generator=other))


def test_no_items_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on"):
        batch_of_groups([], 2, 0, 0)

"""Batches as functions of the seed and their number."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.images.order import ImageOrder

SQUARE, WIDE = (64, 64), (32, 128)


def epoch_of(order, epoch):
    """The batches of an epoch, by walking through all batches of those before it."""
    sizes = [sum(-(-len(group) // order.batch_size) for group in order.groups(n)) for n in range(epoch + 1)]
    return [order(sum(sizes[:-1]) + number) for number in range(sizes[-1])]


@given(st.lists(st.sampled_from([SQUARE, WIDE]), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 2))
def test_epochs_are_complete_and_buckets_never_mixed(buckets, batch_size, epoch):
    order = ImageOrder(buckets, [2] * len(buckets), batch_size, seed=1)
    batches = epoch_of(order, epoch)
    assert Counter(row for batch in batches for row in batch) == dict.fromkeys(range(len(buckets)), 2)
    assert all(len({buckets[row] for row in batch}) == 1 for batch in batches)


@given(st.lists(st.floats(0.1, 4), min_size=1, max_size=6), st.integers(1, 30))
def test_fractions_of_an_epoch_add_up(repeats, epochs):
    """Other trainers drop a folder with less than one repeat, or round it."""
    order = ImageOrder([SQUARE] * len(repeats), repeats, 2, seed=1)
    seen = Counter(index for epoch in range(epochs) for group in order.groups(epoch) for index in group)
    assert all(abs(seen[index] - epochs * times) < 1 + 1e-9 for index, times in enumerate(repeats))


def test_half_of_the_images_come_in_every_epoch():
    order = ImageOrder([SQUARE] * 4, [0.5] * 4, 8, seed=0)
    assert [sorted(order(number)) for number in range(4)] == [[2, 3], [0, 1], [2, 3], [0, 1]]
    rare = ImageOrder([SQUARE], [0.25], 1, seed=0)  # three epochs of four are empty
    assert [rare(number) for number in range(3)] == [[0], [0], [0]]


def test_a_batch_depends_on_its_number_alone():
    settings = [SQUARE] * 5 + [WIDE] * 2, [1, 2.5, 0.5, 1, 3, 1, 0.5], 2, 7
    one, other = ImageOrder(*settings), ImageOrder(*settings)
    assert [other(n) for n in reversed(range(20))][::-1] == [one(n) for n in range(20)]


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on"):
        ImageOrder([], [], 2, 0)

"""The schedule of multi-task training: how often each task occurs, which rows, and resuming at any batch."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.data.vl.mixing import GROUPED, TaskBatches

TASKS = st.dictionaries(
    st.sampled_from(["vqa", "gqa", "nlvr2", "caption"]), st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1
)


def schedule(tasks, seed=0, weights=None) -> TaskBatches:
    sizes, batch_sizes = ({task: pair[i] for task, pair in tasks.items()} for i in (0, 1))
    return TaskBatches(sizes, batch_sizes, weights=weights, seed=seed)


@given(TASKS, st.integers(0, 3))
def test_every_task_occurs_as_often_as_it_has_batches(tasks, epoch):
    batches = schedule(tasks)
    length = batches.batches_per_epoch
    found = Counter(batches(number)[0] for number in range(epoch * length, (epoch + 1) * length))
    assert found == {task: -(-size // batch_size) for task, (size, batch_size) in tasks.items()}


@given(TASKS, st.integers(0, 2**40), st.integers(1, 60))
def test_all_rows_of_a_task_are_used_before_any_is_repeated(tasks, seed, count):
    batches = schedule(tasks, seed)
    rows: dict[str, list[int]] = {task: [] for task in tasks}
    for number in range(count):
        task, indices = batches(number)
        assert len(indices) == tasks[task][1]
        rows[task] += indices
    for task, (size, _) in tasks.items():
        for start in range(0, len(rows[task]), size):
            once = rows[task][start : start + size]
            assert len(set(once)) == len(once)
            assert set(once) <= set(range(size))


@given(TASKS, st.integers(0, 500))
def test_a_batch_depends_only_on_seed_and_number(tasks, number):
    batches = schedule(tasks, seed=3)
    before = [batches(earlier) for earlier in range(min(number, 20))]
    assert schedule(tasks, seed=3)(number) == batches(number)
    assert [batches(earlier) for earlier in range(min(number, 20))] == before


def test_order_and_rows_change_with_epoch_and_seed():
    tasks = {"vqa": (40, 2), "gqa": (40, 2)}
    batches = schedule(tasks)
    epochs = [[batches(40 * epoch + number) for number in range(40)] for epoch in range(2)]
    assert [task for task, _ in epochs[0]] != [task for task, _ in epochs[1]]
    assert epochs[0] != [schedule(tasks, seed=1)(number) for number in range(40)]
    of_vqa, of_gqa = ([rows for task, rows in epochs[0] if task == name] for name in tasks)
    assert of_vqa != of_gqa  # equal sizes, but different orders


def test_weights_set_how_often_a_task_occurs():
    tasks = {"vqa": (100, 10), "gqa": (50, 10), "nlvr2": (3, 10)}
    batches = schedule(tasks, weights={"vqa": 0.5, "nlvr2": 0.1})
    assert batches.batches_per_epoch == 5 + 5 + 1
    assert Counter(batches(number)[0] for number in range(11)) == {"vqa": 5, "gqa": 5, "nlvr2": 1}
    seen = [row for number in range(22) for task, rows in [batches(number)] if task == "vqa" for row in rows]
    assert sorted(seen) == list(range(100))  # two epochs at half the weight


def test_a_task_without_rows_is_named():
    with pytest.raises(ValueError, match="train gqa on"):
        schedule({"vqa": (4, 2), "gqa": (0, 2)})


@settings(max_examples=8)
@given(TASKS, st.integers(0, 2**40))
def test_rows_of_about_the_same_length_are_together(tasks, seed):
    """The rows of each group of batches are those of the batches that are not grouped, whatever is asked for first."""
    lengths = {task: np.random.default_rng(seed).integers(1, 999, size) for task, (size, _) in tasks.items()}
    sizes, batch_sizes = ({task: pair[i] for task, pair in tasks.items()} for i in (0, 1))
    plain = TaskBatches(sizes, batch_sizes, seed=seed)
    grouped = TaskBatches(sizes, batch_sizes, seed=seed, lengths=lengths)
    count = next(n for n in range(1, 10**6) if n % plain.batches_per_epoch == 0 and n >= GROUPED * 2 * len(tasks))
    found = [grouped(number) for number in range(count)]
    again = TaskBatches(sizes, batch_sizes, seed=seed, lengths=lengths)
    assert [again(number) for number in reversed(range(count))] == found[::-1]
    expected = [plain(number) for number in range(count)]
    assert [task for task, _ in found] == [task for task, _ in expected]
    for task in tasks:
        ours, theirs = ([rows for name, rows in batches if name == task] for batches in (found, expected))
        for start in range(0, len(ours) - GROUPED + 1, GROUPED):
            group = slice(start, start + GROUPED)
            assert Counter(row for rows in ours[group] for row in rows) == Counter(
                row for rows in theirs[group] for row in rows
            )
            ranges = sorted((min(lengths[task][rows]), max(lengths[task][rows])) for rows in ours[group])
            assert all(high <= low for (_, high), (low, _) in pairwise(ranges))

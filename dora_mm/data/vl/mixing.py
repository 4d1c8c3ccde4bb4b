"""The schedule of multi-task training: which task each batch belongs to, and which rows it contains."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from dora_mm.utils.randomness import generator

GROUPED = 32  # batches whose rows are sorted by length together


class TaskBatches:
    """The batches of several tasks, a function of (seed, batch number) only, so that resuming at any batch is exact.

    In an epoch every task has ceil(size / batch size) batches, times its weight (rounded, at least one). The order of
    tasks is reshuffled in every epoch. The rows of a task follow an endless sequence of seeded permutations: each row
    is used once before any is repeated, and a batch may straddle two permutations, so that all batches are full. The
    rows of a task with several sources are in the order of a `Mixture` instead.

    Args:
        sizes: Number of rows of each task, or the mixture of its rows.
        batch_sizes: Rows per batch of each task.
        weights: Factor on the number of batches of each task; 1 for tasks that are not listed.
        seed: The seed of the run.
        purpose: What the order is of, since two that share a seed must differ.
        lengths: Of tasks whose batches are of rows of about the same length: that of each row.

    Raises:
        ValueError: A task has no rows.
    """

    def __init__(
        self,
        sizes: "Mapping[str, int | Mixture]",
        batch_sizes: Mapping[str, int],
        *,
        weights: Mapping[str, float] | None = None,
        seed: int,
        purpose: str = "order of tasks",
        lengths: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._lengths = lengths or {}
        self._last: tuple[str, int, list[int]] = ("", -1, [])  # the group of batches that was asked for last
        self._mixtures = {task: size for task, size in sizes.items() if isinstance(size, Mixture)}
        sizes = {task: size if isinstance(size, int) else len(size) for task, size in sizes.items()}
        empty = [task for task, size in sizes.items() if size < 1]
        if empty:
            raise ValueError(f"there is nothing to train {' and '.join(empty)} on: the data set has no rows")
        self._tasks = tuple(sizes)
        self._sizes, self._batch_sizes, self._seed, self._purpose = sizes, dict(batch_sizes), seed, purpose
        weights = weights or {}
        self._counts = tuple(
            max(1, round(-(-size // batch_sizes[task]) * weights.get(task, 1.0))) for task, size in sizes.items()
        )

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of all tasks in an epoch."""
        return sum(self._counts)

    def __call__(self, number: int) -> tuple[str, list[int]]:
        """The task of batch `number` (from 0, counted across epochs) and the row indices within that task."""
        epoch, position = divmod(number, self.batches_per_epoch)
        order, earlier = _epoch_schedule(self._counts, epoch, self._seed, self._purpose)
        task_index = int(order[position])
        task = self._tasks[task_index]
        own_number = epoch * self._counts[task_index] + int(earlier[position])
        return task, (self._grouped_rows if task in self._lengths else self._rows)(task, own_number)

    def _grouped_rows(self, task: str, number: int) -> list[int]:
        """As `_rows`, of GROUPED batches that have the same rows together, sorted by length and cut anew."""
        group, index = divmod(number, GROUPED)
        order = torch.randperm(GROUPED, generator=generator(self._seed, group, f"order of batches of {task}"))
        start = int(order[index]) * self._batch_sizes[task]
        if self._last[:2] != (task, group):
            rows = [row for n in range(group * GROUPED, (group + 1) * GROUPED) for row in self._rows(task, n)]
            by_length = np.argsort(self._lengths[task][rows], kind="stable")
            self._last = (task, group, [rows[index] for index in by_length.tolist()])
        return self._last[2][start : start + self._batch_sizes[task]]

    def _rows(self, task: str, number: int) -> list[int]:
        """The row indices of batch `number` of this task, counted over the batches of this task only."""
        size, batch_size = self._sizes[task], self._batch_sizes[task]
        positions = np.arange(number * batch_size, (number + 1) * batch_size)
        if mixture := self._mixtures.get(task):
            return [mixture.row_at(position) for position in positions.tolist()]
        passes, within = np.divmod(positions, size)
        pieces = [_permutation(size, int(p), self._seed, task)[within[passes == p]] for p in np.unique(passes)]
        return np.concatenate(pieces).tolist()


class Mixture:
    """The rows of several sources of a task in one endless order, a function of (seed, position) only.

    In an epoch each source has as many rows as it holds, times its weight (rounded, at least one), shuffled among those
    of the others. The rows of a source follow an endless sequence of seeded permutations.

    Args:
        task: Name of the task.
        sources: The rows of each source, by their index in the task's table.
        weights: How often the rows of each are drawn.
        seed: The seed of the run.

    Raises:
        ValueError: A source has no rows.
    """

    def __init__(self, task: str, sources: Sequence[np.ndarray], weights: Sequence[float], *, seed: int) -> None:
        self._rows = {f"source {number + 1} of {task}": rows for number, rows in enumerate(sources)}
        self._order = TaskBatches(
            {name: len(rows) for name, rows in self._rows.items()},
            dict.fromkeys(self._rows, 1),
            weights=dict(zip(self._rows, weights, strict=True)),
            seed=seed,
            purpose=f"order of the sources of {task}",
        )

    def __len__(self) -> int:
        """The number of rows in an epoch."""
        return self._order.batches_per_epoch

    def row_at(self, position: int) -> int:
        """The index of the row at a position, from 0, counted across epochs."""
        name, [row] = self._order(position)
        return int(self._rows[name][row])


@lru_cache(maxsize=8)
def _epoch_schedule(counts: tuple[int, ...], epoch: int, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """The task index of every batch of an epoch, and how many batches of that task precede it in the epoch."""
    tasks = np.repeat(np.arange(len(counts)), counts)
    order = tasks[torch.randperm(len(tasks), generator=generator(seed, epoch, purpose)).numpy()]
    earlier = np.empty_like(order)
    for task, count in enumerate(counts):
        earlier[order == task] = np.arange(count)
    return order, earlier


@lru_cache(maxsize=32)  # 3.5 MB each for 440,000 rows
def _permutation(size: int, number: int, seed: int, task: str) -> np.ndarray:
    return torch.randperm(size, generator=generator(seed, number, f"order of rows of {task}")).numpy()

"""The schedule of multi-task training: which task each batch belongs to, and which rows it contains."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from dora_mm.utils.randomness import generator


class TaskBatches:
    """The batches of several tasks, a function of (seed, batch number) only, so that resuming at any batch is exact.

    In an epoch every task has ceil(size / batch size) batches, times its weight (rounded, at least one). The order of
    tasks is reshuffled in every epoch. The rows of a task follow an endless sequence of seeded permutations: each row
    is used once before any is repeated, and a batch may straddle two permutations, so that all batches are full.

    Args:
        sizes: Number of rows of each task.
        batch_sizes: Rows per batch of each task.
        weights: Factor on the number of batches of each task; 1 for tasks that are not listed.
        seed: The seed of the run.

    Raises:
        ValueError: A task has no rows.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        *,
        weights: Mapping[str, float] | None = None,
        seed: int,
    ) -> None:
        empty = [task for task, size in sizes.items() if size < 1]
        if empty:
            raise ValueError(f"there is nothing to train {' and '.join(empty)} on: the data set has no rows")
        self._tasks = tuple(sizes)
        self._sizes, self._batch_sizes, self._seed = dict(sizes), dict(batch_sizes), seed
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
        order, earlier = _epoch_schedule(self._counts, epoch, self._seed)
        task_index = int(order[position])
        task = self._tasks[task_index]
        return task, self._rows(task, epoch * self._counts[task_index] + int(earlier[position]))

    def _rows(self, task: str, number: int) -> list[int]:
        """The row indices of batch `number` of this task, counted over the batches of this task only."""
        size, batch_size = self._sizes[task], self._batch_sizes[task]
        positions = np.arange(number * batch_size, (number + 1) * batch_size)
        passes, within = np.divmod(positions, size)
        pieces = [_permutation(size, int(p), self._seed, task)[within[passes == p]] for p in np.unique(passes)]
        return np.concatenate(pieces).tolist()


@lru_cache(maxsize=4)
def _epoch_schedule(counts: tuple[int, ...], epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The task index of every batch of an epoch, and how many batches of that task precede it in the epoch."""
    tasks = np.repeat(np.arange(len(counts)), counts)
    order = tasks[torch.randperm(len(tasks), generator=generator(seed, epoch, "order of tasks")).numpy()]
    earlier = np.empty_like(order)
    for task, count in enumerate(counts):
        earlier[order == task] = np.arange(count)
    return order, earlier


@lru_cache(maxsize=32)  # 3.5 MB each for 440,000 rows
def _permutation(size: int, number: int, seed: int, task: str) -> np.ndarray:
    return torch.randperm(size, generator=generator(seed, number, f"order of rows of {task}")).numpy()

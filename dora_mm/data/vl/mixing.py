"""Which task comes when, and with which rows: training on several tasks, one task to a batch."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from dora_mm.utils.randomness import generator

__all__ = ["TaskBatches"]


class TaskBatches:
    """The batches of several tasks as a function of (seed, number) alone, so that resuming at any one is exact.

    In an epoch every task has ceil(size / batch size) batches, times its weight (rounded, at least one), in an order
    that is shuffled anew. Within a task, rows come in one endless sequence of seeded permutations of all its rows: all
    come before one comes again, and a batch may straddle two of them, so that all batches are full.

    sizes, batch_sizes: by task. weights: by task, 1 where left out.

    Raises:
        ValueError: a task has no rows.
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
            raise ValueError(f"there is nothing to train {' and '.join(empty)} on: the data set holds no rows")
        self._tasks = tuple(sizes)
        self._sizes, self._batch_sizes, self._seed = dict(sizes), dict(batch_sizes), seed
        weights = weights or {}
        self._counts = tuple(
            max(1, round(-(-size // batch_sizes[task]) * weights.get(task, 1.0))) for task, size in sizes.items()
        )

    @property
    def batches_per_epoch(self) -> int:
        return sum(self._counts)

    def __call__(self, number: int) -> tuple[str, list[int]]:
        """The task of batch `number` (from 0), and which of its rows are in it."""
        epoch, position = divmod(number, self.batches_per_epoch)
        order, times = _epoch_schedule(self._counts, epoch, self._seed)
        which = int(order[position])
        task = self._tasks[which]
        return task, self._rows(task, epoch * self._counts[which] + int(times[position]))

    def _rows(self, task: str, number: int) -> list[int]:
        """The rows of the task's own batch `number`."""
        size, batch_size = self._sizes[task], self._batch_sizes[task]
        positions = np.arange(number * batch_size, (number + 1) * batch_size)
        passes, within = np.divmod(positions, size)
        pieces = [_permutation(size, int(p), self._seed, task)[within[passes == p]] for p in np.unique(passes)]
        return np.concatenate(pieces).tolist()


@lru_cache(maxsize=4)
def _epoch_schedule(counts: tuple[int, ...], epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of the task of every batch of an epoch, and how often the task came before in it."""
    tasks = np.repeat(np.arange(len(counts)), counts)
    order = tasks[torch.randperm(len(tasks), generator=generator(seed, epoch, "order of tasks")).numpy()]
    times = np.empty_like(order)
    for task, count in enumerate(counts):
        times[order == task] = np.arange(count)
    return order, times


@lru_cache(maxsize=32)  # 3.5 MB each for 440,000 rows
def _permutation(size: int, number: int, seed: int, task: str) -> np.ndarray:
    return torch.randperm(size, generator=generator(seed, number, f"order of rows of {task}")).numpy()

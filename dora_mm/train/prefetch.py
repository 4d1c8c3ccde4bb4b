"""Batches that are prepared while the model trains on the one before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetcher:
    """Maps a batch number to its batch, and prepares the next one meanwhile, in a thread.

    A batch depends on its number alone, so training is the same with and without, and resumes exactly. Used as a
    context, which ends the thread.

    Args:
        batches: Maps a number to a batch.
        enabled: False computes every batch when it is requested.
    """

    def __init__(self, batches: Callable[[int], Any], *, enabled: bool = True):
        self._batches = batches
        self._pool = ThreadPoolExecutor(1, "batches") if enabled else None
        self._next: tuple[int, Future] | None = None

    def __call__(self, number: int) -> Any:
        """The batch of this number; an error in preparing it is raised here."""
        if self._pool is None:
            return self._batches(number)
        ahead, self._next = self._next, None
        batch = ahead[1].result() if ahead and ahead[0] == number else self._batches(number)
        self._next = (number + 1, self._pool.submit(self._batches, number + 1))
        return batch

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

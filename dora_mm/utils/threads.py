"""Work that several threads share."""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from itertools import islice
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def as_completed(count: int, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """The results of a function for items in the order in which they come, computed by several threads.

    After an error no further item is begun; the results of those that were are given before it is raised.

    Args:
        count: The number of threads.
        function: Computes a result.
        items: The items.
    """
    waiting, error = iter(items), None
    with futures.ThreadPoolExecutor(count) as threads:
        running = {threads.submit(function, item) for item in islice(waiting, count)}
        while running:
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for each in done:
                if found := each.exception():
                    error = error or found
                    continue
                if error is None:
                    running |= {threads.submit(function, item) for item in islice(waiting, 1)}
                yield each.result()
    if error is not None:
        raise error

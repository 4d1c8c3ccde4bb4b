"""Work that the processes of a training share."""

from collections.abc import Callable, Iterable
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def map_shared(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], process: tuple[int, int] = (0, 1)
) -> list[ResultT]:
    """The results of a function for items, in their order, in every process; each computes a share of them.

    Args:
        function: Computes a result that can be pickled, since the processes send it to each other.
        items: The same in all processes.
        process: (index, count) of this one.
    """
    index, count = process
    own = [(number, function(item)) for number, item in enumerate(items) if number % count == index]
    if count > 1:
        from accelerate.utils import gather_object

        own = gather_object(own)
    return [result for _, result in sorted(own, key=lambda found: found[0])]

"""Evaluations in the middle of a training: networks in eval mode, and work that its processes share."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
# The results of a function for items, in their order, in every process: `map`, or what divides them among processes
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@contextlib.contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[nn.ModuleList]:
    """Puts networks in eval mode, without gradients; afterwards each of their modules is in the mode that it had."""
    together = nn.ModuleList(networks)
    before = {module: module.training for module in together.modules()}  # parts of a network may differ
    try:
        with torch.no_grad():
            yield together.eval()
    finally:
        for module, training in before.items():
            module.training = training


def map_shared(
    function: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    process: tuple[int, int] = (0, 1),
    *,
    in_step: bool = False,
) -> list[ResultT]:
    """The results of a function for items, in their order, in every process; each computes a share of them.

    Args:
        function: Computes a result that can be pickled, since the processes send it to each other.
        items: The same in all processes.
        process: (index, count) of this one.
        in_step: Each process computes equally many, the last ones some a second time, since they compute together.
    """
    index, count = process
    own: list[tuple[int, ResultT]] = []
    last = None
    for number, item in enumerate(items):
        if number % count == index:
            own.append((number, function(item)))
        last = number % count, item
    if in_step and last and last[0] < index:
        function(last[1])
    if count > 1:
        from accelerate.utils import gather_object

        own = gather_object(own)
    return [result for _, result in sorted(own, key=lambda found: found[0])]

"""Several adapted networks at the cost of their base models, for as long as nothing trains them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.inject import fixed_parameters, merge, unmerge
from dora_mm.core.quantized import DoRAQuantized


@contextmanager
def merged_adapters(networks: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which the adapters of networks are merged, so that a pass costs what it does without them.

    Quantised weights cannot be merged: theirs are computed once.

    Args:
        networks: Networks, adapted or not.
    """
    with ExitStack() as stack:
        for network in networks:
            active = [m for m in network.modules() if isinstance(m, AdaptedLayer) and not m.is_base()]
            if any(isinstance(layer, DoRAQuantized) for layer in active):
                stack.enter_context(fixed_parameters(network))
            elif active:
                merge(network)
                stack.callback(unmerge, network)
        yield

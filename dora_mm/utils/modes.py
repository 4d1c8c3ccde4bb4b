"""The modes that networks compute in."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


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

"""Weights that are shown, scored and saved in the place of those that are trained."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dora_mm.train.optim import averaged_point


@contextlib.contextmanager
def swapped(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Gives parameters other values for a while; afterwards they have the very tensors of before."""
    kept = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


@contextlib.contextmanager
def result_of(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives the trained parameters the values that a training would end with now; also a decorator.

    They have these already, but with a schedule-free optimizer, which takes gradients at another point.
    """
    with swapped(averaged_point(optimizer) or {}):
        yield

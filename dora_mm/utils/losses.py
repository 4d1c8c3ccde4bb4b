"""The loss of a batch before it is divided by anything, and that of a whole step."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossSum(NamedTuple):
    """A loss as a sum and what to divide it by: both are first added up over all batches of an optimizer step.

    Attributes:
        total: The sum over the images, rows or tokens of a batch, (), float32.
        count: Their number, or the sum of their weights, ().
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of this batch alone, (); of a batch without anything to learn it is 0."""
        return self.total / self.divisor

    @property
    def divisor(self) -> Tensor:
        """The count, or 1 where it is 0."""
        return torch.where(self.count > 0, self.count, torch.ones_like(self.count))


class PassResult(NamedTuple):
    """The result of the passes of one optimizer step, besides the gradients.

    Attributes:
        loss: The mean loss of the step, (), on the device: reading it waits for a GPU.
        scale: The factor of the gradients in the passes, relative to those of this loss, (), likewise.
    """

    loss: Tensor
    scale: Tensor

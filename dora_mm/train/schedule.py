"""The learning-rate schedule: a linear warm-up, then the shape that a config names."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dora_mm.config.training import ScheduleConfig

log = logging.getLogger(__name__)

SHAPES: dict[str, Callable[[int, int], float]] = {  # of the steps since the warm-up, and all that come after it
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: max(0.0, (steps - step) / max(1, steps)),
    "cosine": lambda step, steps: max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step / max(1, steps))))),
}


class Schedule(LRScheduler):
    """The learning rate of each optimizer step, a function of the step alone.

    A checkpoint restores the position and the warm-up, but neither the learning rates nor the length: those are the
    config's, because a run that has diverged goes on with a lower rate, and one may be extended. A constant rate is the
    same in a longer run. The rates of the other shapes depend on the length, so they go on as in a run of the new
    length, which the finished steps were not: a warning says so.

    Args:
        optimizer: Its learning rates are those after the warm-up.
        name: "constant"; or "cosine" or "linear", which reach 0 at `steps`.
        warmup: Optimizer steps of linear warm-up from 0.
        steps: The length of the training in optimizer steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int):
        self.name, self.warmup, self.steps = name, warmup, steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by after `step` finished steps; as in diffusers, bit for bit."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        return SHAPES[self.name](step - self.warmup, self.steps - self.warmup)

    def get_lr(self) -> list[Any]:
        """The learning rates of the next step, one per parameter group."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, except for the learning rates and the length."""
        rates, steps = self.base_lrs, self.steps
        super().load_state_dict(state_dict)
        before, self.base_lrs, self.steps = self.steps, rates, steps
        self._last_lr = self.get_lr()
        for group, first, rate in zip(self.optimizer.param_groups, rates, self._last_lr, strict=True):
            group |= {"initial_lr": first, "lr": rate}
        if before != steps and self.name != "constant" and self.last_epoch > self.warmup:
            log.warning(
                "schedule.name %s now ends at step %d: the rate goes on at %.2e, but the %d finished steps had the "
                "rates of a run of %d, so the result is not that of %d steps from the start.",
                *(self.name, steps, self._last_lr[0], self.last_epoch, before, steps),
            )


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int) -> Schedule:
    """Builds the learning-rate schedule over `steps` optimizer steps, from the `schedule` section."""
    return Schedule(optimizer, config.name, config.warmup_steps or round(config.warmup_ratio * steps), steps)

"""The learning-rate schedule: a linear warm-up, then the shape that a config names."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dora_mm.config.training import ScheduleConfig

log = logging.getLogger(__name__)


def _cosine(share: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * share)))


def _restarts(schedule: "Schedule", step: int, steps: int) -> float:
    share = step / max(1, steps)
    return _cosine((schedule.cycles * share) % 1.0) if share < 1 else 0.0


def _warmup_stable_decay(schedule: "Schedule", step: int, steps: int) -> float:
    decay = round(schedule.decay_ratio * schedule.steps)
    return _cosine((step - (steps - decay)) / max(1, decay)) if step >= steps - decay else 1.0


SHAPES: dict[str, Callable[["Schedule", int, int], float]] = {  # of steps since the warm-up, and all that come after it
    "constant": lambda schedule, step, steps: 1.0,
    "linear": lambda schedule, step, steps: max(0.0, (steps - step) / max(1, steps)),
    "cosine": lambda schedule, step, steps: _cosine(step / max(1, steps)),
    "restarts": _restarts,
    "polynomial": lambda schedule, step, steps: max(0.0, 1 - step / max(1, steps)) ** schedule.power,
    "warmup_stable_decay": _warmup_stable_decay,
}


class Schedule(LRScheduler):
    """The learning rate of each optimizer step, a function of the step alone.

    A checkpoint restores the position and the shape, but neither the learning rates nor the length: those are the
    config's, because a run that has diverged goes on with a lower rate, and one may be extended. Where the finished
    steps of the longer run would have had other rates, a warning says so.

    Args:
        optimizer: Its learning rates are those after the warm-up.
        config: The `schedule` section; all shapes but the constant one reach 0 at `steps`.
        steps: The length of the training in optimizer steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int):
        self.name, self.steps = config.name, steps
        self.warmup = config.warmup_steps or round(config.warmup_ratio * steps)
        self.cycles, self.power = config.cycles or 4, config.power or 2.0
        self.decay_ratio = config.decay_ratio or 0.1
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The multiplier of the learning rate after `step` finished steps; bit-identical to diffusers."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        return SHAPES[self.name](self, step - self.warmup, self.steps - self.warmup)

    def get_lr(self) -> list[Any]:
        """The learning rates of the next step, one per parameter group."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, except for the learning rates and the length."""
        rates, steps, done = self.base_lrs, self.steps, state_dict["last_epoch"]
        from_the_start = [self.factor(step) for step in range(done)]
        super().load_state_dict(state_dict)
        before = [self.factor(step) for step in range(done)]
        old_steps, self.base_lrs, self.steps = self.steps, rates, steps
        self._last_lr = self.get_lr()
        for group, first, rate in zip(self.optimizer.param_groups, rates, self._last_lr, strict=True):
            group |= {"initial_lr": first, "lr": rate}
        if steps != old_steps and before != from_the_start:
            log.warning(
                "schedule.name %s now ends at step %d: the rate goes on at %.2e, but the %d finished steps had the "
                "rates of a run of %d, so the result is not that of %d steps from the start.",
                *(self.name, steps, self._last_lr[0], done, old_steps, steps),
            )

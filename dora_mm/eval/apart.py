"""Which images or rows of a data set have losses that stay apart from those of the others."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

# Standard deviations above the median, these by the median deviation: the limit of Iglewicz and Hoaglin (1993). Of made
# losses (tests/eval/test_apart.py) of 10 to 200 images, 2 to 4 % of clean sets have a mark.
LIMIT = 3.5
FEWEST = 8  # images of which one can be told apart
LEAST_SPREAD = 0.02  # of the logarithm of a loss: smaller differences are none
NORMAL = 1.4826  # standard deviations of a normal distribution in a median deviation
LEAST_LOSS = 1e-8

# The losses of an image or row by what they are compared within, such as the resolution and the number of the time
Losses = Mapping[tuple[str, int], float]


class Deviations(NamedTuple):
    """How far a loss is above those of the others, in robust standard deviations.

    Attributes:
        level: Of the loss itself.
        change: Of what became of it since the first measurement; None: that is the only one.
    """

    level: float
    change: float | None


def deviations(first: Mapping[str, Losses] | None, losses: Mapping[str, Losses]) -> dict[str, Deviations]:
    """The deviations of a measurement, by image or row.

    A diffusion loss depends more on the time than on the image. So its logarithm counts, relative to the median over
    all images at the same time and resolution, on average over these. The change since the first measurement, which
    has the same noise, is free of what the noise and the image itself explain.

    Args:
        first: The losses of the first measurement, by image; None: these are the first.
        losses: Those of this measurement.
    """
    now = _relative(losses)
    level, changes = _standardized(now), {}
    if first is not None:
        before = _relative(first)
        changes = _standardized({name: value - before[name] for name, value in now.items() if name in before})
    return {name: Deviations(value, changes.get(name)) for name, value in level.items()}


def apart(measured: Sequence[Mapping[str, Deviations]]) -> dict[str, str]:
    """The images or rows whose loss stays apart, with the reason.

    They are at least LIMIT above the others at each measurement but the first, or at the only one: by the loss itself,
    or by its change. Of fewer than FEWEST none is.

    Args:
        measured: The deviations of all measurements, in their order.
    """
    counted, found = measured[1:] or measured, {}
    for name in counted[-1] if counted and len(counted[-1]) >= FEWEST else ():
        each = [one[name] for one in counted if name in one]
        if all(one.level >= LIMIT for one in each):
            found[name] = "higher than the others"
        elif all(one.change is not None and one.change >= LIMIT for one in each):
            found[name] = "falls less than the others"
    return found


def _relative(losses: Mapping[str, Losses]) -> dict[str, float]:
    """The mean logarithm of each image's losses, each relative to the median over all images."""
    values = defaultdict[tuple[str, int], list[float]](list)
    logs = {name: {key: math.log(max(loss, LEAST_LOSS)) for key, loss in own.items()} for name, own in losses.items()}
    for own in logs.values():
        for key, value in own.items():
            values[key].append(value)
    usual = {key: median(each) for key, each in values.items()}
    return {name: fmean(value - usual[key] for key, value in own.items()) for name, own in logs.items()}


def _standardized(values: Mapping[str, float]) -> dict[str, float]:
    if not values:
        return {}
    middle = median(values.values())
    spread = max(NORMAL * median(abs(value - middle) for value in values.values()), LEAST_SPREAD)
    return {name: (value - middle) / spread for name, value in values.items()}

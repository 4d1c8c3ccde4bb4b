"""DoRASpec: how layers are adapted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

METHODS = ("dora", "lora", "magnitude", "full")
NORM_GRADS = ("detached", "exact")
CACHES = ("weights", "norms")
MOST_ALPHA = 3e38  # layers compute in float32, which ends at 3.4e38


@dataclass(frozen=True)
class DoRASpec:
    """How layers are adapted.

    Attributes:
        rank: The rank R of A (R, I) and B (O, R); at least 1.
        alpha: The update B A is scaled by alpha / rank; above 0. None sets alpha to rank.
        dropout: Probability of dropping entries of the input in the update only; at least 0 and below 1.
        method: `dora`; `lora` (no magnitude); `magnitude` (no A and B); `full` (trains `weight`, adds nothing).
        norm_grad: `detached` (the paper's default) treats the norm as a constant in the backward pass; `exact` does
            not.
        cache: `weights` keeps the W' that the forward pass of a layer builds until its backward pass, and inside
            `fixed_parameters` until its end. `norms` builds it again, which takes time and saves the memory of one more
            weight per layer.
        save_output: Whether the output of a layer may be kept for the backward pass. False saves its memory where the
            model does not keep it anyway, and costs one more product in the backward pass.

    Raises:
        ValueError: A setting has the wrong type or is out of its range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    method: str = "dora"
    norm_grad: str = "detached"
    cache: str = "weights"
    save_output: bool = True

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("norm_grad", NORM_GRADS), ("cache", CACHES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r:.50}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r:.50}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not 0 < finite_number("alpha", self.alpha) <= MOST_ALPHA:
            raise ValueError(f"alpha must be above 0 and at most {MOST_ALPHA:g}, not {self.alpha}")
        if not 0 <= finite_number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank of the update."""
        assert self.alpha is not None
        return self.alpha / self.rank


def finite_number(name: str, value: Any) -> float:
    """Returns a setting as a float.

    Raises:
        ValueError: It is not a finite number; the message has its name.
    """
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r:.50}")
    return number

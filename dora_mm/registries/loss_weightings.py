"""The weightings of the loss of image models by noise level: where the function of each is, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class LossWeighting:
    """A weighting of the loss by noise level.

    Attributes:
        import_path: The function, as `module:function`. It takes float32 numbers (B,) and returns the weights (B,): of
            flow models it takes noise levels s, 0 < s <= 1; of models that predict noise or v signal-to-noise ratios.
        models: The models that it is for: "flow", "noise" (which predict noise or v), or both.
    """

    import_path: str
    models: frozenset[Literal["flow", "noise"]]


FLOW: frozenset[Literal["flow", "noise"]] = frozenset({"flow"})
BOTH: frozenset[Literal["flow", "noise"]] = frozenset({"flow", "noise"})
LOSS_WEIGHTINGS: Registry[LossWeighting] = Registry(
    "loss_weightings",
    "loss weighting",
    {
        "none": LossWeighting("torch:ones_like", BOTH),
        "sigma_sqrt": LossWeighting("dora_mm.tasks.diffusion:sigma_sqrt", FLOW),
        "cosmap": LossWeighting("dora_mm.tasks.diffusion:cosmap", FLOW),
    },
)

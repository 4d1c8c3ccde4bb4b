"""The state of an adapted layer besides the parameters A, B and m."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_mm.core.forms import Forward
from dora_mm.core.inference import KeptPasses
from dora_mm.core.passes import PassCache
from dora_mm.core.spec import DoRASpec

ADAPTER_NAMES = ("lora_A", "lora_B", "magnitude")


@dataclass
class StackedAdapter:
    """One more adapter on a layer, frozen: its tensors are not parameters, and not part of a state dict."""

    spec: DoRASpec
    tensors: dict[str, Tensor]  # by the names of ADAPTER_NAMES
    strength: float
    assists: bool = False  # as in `Adaptation`


@dataclass
class Adaptation:
    """The state of an adapted layer besides the parameters A, B and m.

    Attributes:
        base_class: The class that the layer had.
        spec: The settings of the adapter.
        path: Its path in the model; A is sampled with it and `seed`.
        seed: The seed.
        name: The name of the adapter that A, B and m belong to.
        forward: The implementation of the layer.
        trainable_before: Whether its weight was trained.
        strength: The strength of A, B and m.
        assists: Whether they are those of an assistant, a frozen adapter that other adapters are trained over and that
            is not saved with them.
        stacked: More adapters by name.
        made_for: Device and dtype of the weight that `first_magnitude` was computed from.
        first_magnitude: The m of a fresh adapter, the row norms of the weight; None without a magnitude.
        merged: Whether the weight is W(t).
        base_weight: While merged, the base weight as stored, unless it was not kept.
        caches: Inside `fixed_parameters`, its caches, by dtype and device of the product and by inference mode.
        checks_update: Whether the last pass found no update, see `PassCache`.
        num_passes: Inside `fixed_parameters`, the number of passes; None where only the base weight is fixed.
        kept: Outside of it, the values that inference passes share.
    """

    base_class: type[nn.Module]
    spec: DoRASpec
    path: str
    seed: int
    name: str
    forward: Forward
    trainable_before: bool
    strength: float = 1.0
    assists: bool = False
    stacked: dict[str, StackedAdapter] = field(default_factory=dict)
    made_for: tuple[torch.device, torch.dtype] = (torch.device("meta"), torch.float32)
    first_magnitude: Tensor | None = None
    merged: bool = False
    base_weight: Tensor | None = None
    caches: dict[Hashable, PassCache] | None = None
    checks_update: bool = True
    num_passes: float | None = None
    kept: KeptPasses | None = None

    def forget(self, *, base: bool = False) -> None:
        """Forgets what passes found, where an adapter was changed, or with `base` the weight."""
        self.checks_update, self.kept = True, None
        if base:
            self.caches = None
        self.end_passes()

    def end_passes(self) -> None:
        """Discards what `fixed_parameters` keeps of the adapters."""
        self.num_passes = None
        for cache in (self.caches or {}).values():
            cache.forget_adapters()

    def __getstate__(self):
        return {**self.__dict__, "caches": None, "num_passes": None, "kept": None}

"""Layers that train their own weight: method `full`, which adds nothing."""

from __future__ import annotations

from torch import nn

from dora_mm.core.adapted import NOT_STACKED, AdaptedLayer
from dora_mm.core.functional import Adapter


class TrainedWeight(AdaptedLayer):
    """Mixin for adapted classes that train the weight itself: the base layer's forward pass, without a strength."""

    @classmethod
    def why_not(cls, layer, path, spec):
        if why := super().why_not(layer, path, spec):
            return why
        if cls.not_full:
            return f"{path} {cls.not_full}"
        if layer.get_parameter("weight").dtype.itemsize < 4:
            return f"method full trains {path} itself, and half precision loses small steps: load it in float32"
        return None

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def adapters(self) -> tuple[Adapter, ...]:
        return ()

    def is_base(self) -> bool:
        return True

    def check_can_stack(self, name, spec) -> None:
        self.check_not_merged()
        raise ValueError(f"{self.adaptation.path} {NOT_STACKED}")

    def check_has_strength(self) -> None:
        raise ValueError(
            f"{self.adaptation.path} was trained with method full, which keeps no base: it has no strength"
        )

    # No adapter has to follow the weight.

    def reset_adapter(self) -> None:
        self.adaptation.forget()

    def follow_weight(self, *, redraw: bool = False) -> None:
        self.adaptation.forget(base=True)

    def why_not_load(self, *, bare: bool) -> str | None:
        return super().why_not_load(bare=False)

    def after_load(self, *, bare: bool) -> None:
        return

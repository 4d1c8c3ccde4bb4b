"""Linear layers whose weight is quantised (QDoRA).

They are those of bitsandbytes in 4 and 8 bits, of torchao, transformers' `FP8Linear`, and our `Float8Linear`.

W0 is what the package's own dequantisation returns. It is computed again in each pass; neither W0 nor W' is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.ops import LINEAR
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.core.wrappers.sharded import gathered
from dora_mm.core.wrappers.subclasses import subclass

BITSANDBYTES = ("Linear4bit", "Linear8bitLt")
FP8 = torch.float8_e4m3fn  # of transformers' FP8Linear and FP8Experts, with a scale for each block


class DoRAQuantized(AdaptedLayer):
    """A mixin for the class of the base layer, see `subclass`. Multiplies in the dtype of its input."""

    not_full = "is quantised, and method full trains weights: load the model in float32"

    @classmethod
    def class_for(cls, layer):
        return subclass(cls, type(layer)) if is_quantized(layer) else None

    @classmethod
    def why_not(cls, layer, path, spec):
        """Says also where the layer is not ready: bitsandbytes quantises a layer when it is moved to its device."""
        weight: Any = layer.weight
        kind = type(weight).__name__
        parts = (weight.quant_state,) if kind == "Params4bit" else _int8_parts(layer) if kind == "Int8Params" else ()
        if any(part is None for part in parts):
            return f"{path} is not quantised yet: move the model to its device first"
        return super().why_not(layer, path, spec)

    @property
    def matrix(self) -> Tensor:
        """The dequantised weight (O, I), in new memory."""
        return dequantized(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_base():
            return self.adaptation.base_class.forward(self, x)
        return self.adapted_product(x, LINEAR, dtype=x.dtype, restore=lambda: self.matrix).to(x.dtype)

    def check_can_merge(self) -> None:
        raise ValueError(
            f"{self.adaptation.path} is quantised, and merging would lose the update: merge into a dense model"
        )


def dequantized(layer: nn.Module) -> Tensor:
    """Returns the dequantised weight (O, I) of a quantised layer, whose package is loaded already."""
    if isinstance(layer, Float8Linear):
        return layer.dense()
    weight: Any = layer.weight
    kind = type(weight).__name__
    if is_fp8(layer):
        own: Any = layer
        return dequantized_blocks(gathered(weight), gathered(own.weight_scale_inv), own.block_size)
    if kind == "Params4bit":
        _restore_layout(layer)
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(*_int8_parts(layer))
    if getattr(layer, "quant_state", None) is not None:  # of 4 bits; FSDP2 gives the layer a weight without its class
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(gathered(weight), layer.quant_state)
    return weight.dequantize()


def dequantized_blocks(weight: Tensor, scale: Tensor, block_size: Sequence[int] | None) -> Tensor:
    """The weights of transformers' FP8 layers, in float32.

    Args:
        weight: (O, I) in float8.
        scale: What each block of them is multiplied by, (O / rows, I / columns), rounded up; or one number.
        block_size: Rows and columns of a block; None for one number.
    """
    scale = scale.float()
    if block_size is not None:
        rows, columns = block_size
        scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * scale


def is_fp8(layer: nn.Module) -> bool:
    """Whether this is transformers' FP8Linear, adapted or not, with a weight of 8 bits."""
    kind = layer.adaptation.base_class if isinstance(layer, AdaptedLayer) else type(layer)
    return kind.__module__.endswith(".finegrained_fp8") and kind.__name__ == "FP8Linear" and layer.weight.dtype == FP8


def _restore_layout(layer: Any) -> None:
    """Undoes what bitsandbytes 0.49 does to a 4-bit layer that is evaluated on a CPU with bf16 products.

    It repacks the weight for a kernel of its own, and `dequantize_4bit` does not know that layout. Taking a state dict
    restores it, with scales that were rounded to bf16.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.support_avx512bf16_for_cpu = False  # else the next evaluation at strength 0 repacks it again
        layer.state_dict()


def _int8_parts(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The integers and their scales, which the first pass of the layer moves from the weight into its state."""
    weight, state = layer.weight, layer.state
    return (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)


def is_quantized(layer: nn.Module) -> bool:
    """Whether this is a quantised Linear that can be adapted."""
    if isinstance(layer, Float8Linear) or is_fp8(layer):
        return not isinstance(layer, AdaptedLayer)
    package = type(layer).__module__.partition(".")[0]
    if package == "bitsandbytes":
        return type(layer).__name__ in BITSANDBYTES
    return type(layer) is nn.Linear and type(layer.weight).__module__.partition(".")[0] == "torchao"

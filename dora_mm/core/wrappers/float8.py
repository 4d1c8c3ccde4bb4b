"""Linear layers whose frozen weight is stored in 8 bits, without a package: each row as float8 with a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_mm.core.functional import autocasts

STORED = torch.float8_e4m3fn  # 3 bits of mantissa: a number is off by at most a sixteenth of itself


class Float8Linear(nn.Linear):
    """A Linear that multiplies by `scale * weight`, in the dtype of its input; for frozen weights.

    Attributes:
        weight: (O, I) in float8; the largest of a row is the largest that it has.
        scale: (O, 1), float32.
    """

    scale: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Float8Linear:
        """Stores the weight of a Linear; the bias stays as it is. Rows of zeros stay zeros."""
        W = layer.weight.detach()
        largest = W.float().abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest > 0, largest / torch.finfo(STORED).max, 1)
        return cls.stored(layer, (W.float() / scale).to(STORED), scale)

    @classmethod
    def stored(cls, layer: nn.Linear, weight: Tensor, scale: Tensor) -> Float8Linear:
        """A replacement for a Linear, with its bias, a weight (O, I) that is stored so, and its scale (O, 1)."""
        found = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        found.weight = nn.Parameter(weight, requires_grad=False)
        found.register_buffer("scale", scale)
        found.bias = layer.bias
        return found.train(layer.training)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (O, I) that it multiplies by, in new memory."""
        return (self.weight.float() * self.scale).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        is_cast = autocasts(input.device) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(input.device.type) if is_cast else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.dense(dtype), bias)

"""The adapted layers, one class for each class of base layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.ops import LINEAR, ConvOp, EmbeddingOp


class DoRALinear(AdaptedLayer, nn.Linear):
    """An adapted nn.Linear: A (R, I), B (O, R), magnitude (O,)."""

    base_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.is_base() else self.adapted_product(input, LINEAR)


class DoRAConv(AdaptedLayer, _ConvNd):
    """An adapted nn.Conv1d, nn.Conv2d or nn.Conv3d: A (R, I / groups, *K), B (O, R), magnitude (O,).

    Any stride, padding, dilation and number of groups is supported.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.is_base():
            return super().forward(input)  # of nn.Conv1d, nn.Conv2d or nn.Conv3d
        if unbatched := input.dim() < self.weight.dim():
            input = input.unsqueeze(0)
        padding = self.numeric_padding()
        if self.padding_mode != "zeros" or padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(self.stride)
        y = self.adapted_product(input, ConvOp(self.stride, padding, self.dilation, self.groups))
        return y.squeeze(0) if unbatched else y

    def numeric_padding(self) -> tuple[int, ...] | None:
        """The padding per dimension; None where "same" pads one side more than the other."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return (0,) * len(self.stride)
        totals = [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


class DoRAConv1d(DoRAConv, nn.Conv1d):
    base_class = nn.Conv1d


class DoRAConv2d(DoRAConv, nn.Conv2d):
    base_class = nn.Conv2d


class DoRAConv3d(DoRAConv, nn.Conv3d):
    base_class = nn.Conv3d


class TransposedLayer(AdaptedLayer):
    """A layer that stores its weight as (I, O)."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()


class DoRATransposedLinear(TransposedLayer):
    """An adapted Conv1D of transformers, GPT-2's linear layer: y = x W + b with W (I, O); A (R, I), B (O, R)."""

    @classmethod
    def class_for(cls, layer):
        """Recognises the layer by its name, since core imports only torch."""
        kind = type(layer)
        return cls if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias) if self.is_base() else self.adapted_product(x, LINEAR)


class DoRAEmbedding(TransposedLayer, nn.Embedding):
    """An adapted nn.Embedding: W (num, dim), A (R, num), B (dim, R). As in PEFT, the magnitude is (dim,)."""

    base_class = nn.Embedding
    bias = None

    @classmethod
    def why_not(cls, layer, path, spec):
        if why := super().why_not(layer, path, spec):
            return why
        if spec.dropout:
            return f"{path} is an Embedding, whose inputs are indices and cannot be dropped: set dropout to 0"
        if layer.max_norm is not None:
            return f"{path} has max_norm {layer.max_norm:g}, which changes its weight in every pass"
        return None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.is_base() else self.adapted_product(input, EmbeddingOp(self.padding_idx))

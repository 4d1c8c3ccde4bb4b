"""The adapted layers for each class of base layer, and how a base layer becomes one and is restored."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dora_mm.core.adapted import ADAPTER_NAMES, AdaptedLayer, DoRASpec
from dora_mm.core.attention import DoRAPackedProjection, PackedProjection
from dora_mm.core.convolution import ConvProduct
from dora_mm.core.fused import TORCH, Forward
from dora_mm.core.products import LINEAR, EmbeddingProduct
from dora_mm.core.quantized import DoRAQuantized, adapted_quantized_class, is_quantized


class DoRALinear(AdaptedLayer, nn.Linear):
    """An adapted nn.Linear: A (R, I), B (O, R), magnitude (O,)."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.Linear.forward(self, input) if self.is_base() else self.adapted_product(input, LINEAR)


class DoRAConv(AdaptedLayer, _ConvNd):
    """An adapted nn.Conv1d, nn.Conv2d or nn.Conv3d: A (R, I / groups, *K), B (O, R), magnitude (O,).

    Any stride, padding, dilation and number of groups is supported.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.is_base():
            return self._conv_forward(input, self.weight, self.bias)  # of nn.Conv1d, nn.Conv2d or nn.Conv3d
        if unbatched := input.dim() < self.weight.dim():
            input = input.unsqueeze(0)
        padding = self.numeric_padding()
        if self.padding_mode != "zeros" or padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(self.stride)
        y = self.adapted_product(input, ConvProduct(self.stride, padding, self.dilation, self.groups))
        return y.squeeze(0) if unbatched else y

    def numeric_padding(self) -> tuple[int, ...] | None:
        """The padding per dimension; None where "same" pads one side more than the other."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return (0,) * len(self.stride)
        totals = [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


class DoRAConv1d(DoRAConv, nn.Conv1d): ...


class DoRAConv2d(DoRAConv, nn.Conv2d): ...


class DoRAConv3d(DoRAConv, nn.Conv3d): ...


class TransposedLayer(AdaptedLayer):
    """A layer that stores its weight as (I, O)."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()


class DoRATransposedLinear(TransposedLayer):
    """An adapted Conv1D of transformers, GPT-2's linear layer: y = x W + b with W (I, O); A (R, I), B (O, R)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias) if self.is_base() else self.adapted_product(x, LINEAR)


class DoRAEmbedding(TransposedLayer, nn.Embedding):
    """An adapted nn.Embedding: W (num, dim), A (R, num), B (dim, R). As in PEFT, the magnitude is (dim,)."""

    bias = None

    def forward(self, input: Tensor) -> Tensor:
        if self.is_base():
            return nn.Embedding.forward(self, input)
        return self.adapted_product(input, EmbeddingProduct(self.padding_idx))


ADAPTED_CLASSES: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
    nn.Embedding: DoRAEmbedding,
    NonDynamicallyQuantizableLinear: DoRALinear,  # nn.MultiheadAttention's out_proj, which computes what a Linear does
    PackedProjection: DoRAPackedProjection,
}
ADAPTABLE = "Linear, Conv1d, Conv2d, Conv3d, Embedding, transformers' Conv1D and the projections of MultiheadAttention"


def adapted_class(layer: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted class for a layer, None where it cannot be adapted.

    A subclass of a known class may compute something else, so only exact classes count. transformers' Conv1D is
    recognised by its name, since core imports only torch.
    """
    base = type(layer)
    if is_quantized(layer):
        return adapted_quantized_class(base)
    if (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return DoRATransposedLinear
    if isinstance(weight := getattr(layer, "weight", None), Tensor) and type(weight) not in (Tensor, nn.Parameter):
        return None  # a subclass of Tensor, whose products compute something else
    return ADAPTED_CLASSES.get(base)


def matrix_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight of a layer, (O, I) or (O, I / groups, *K); None where it has no weight.

    It is the shape of a projection's own rows in a packed weight, and of the dequantised weight in a quantised layer.
    Transposed weights (Conv1D, embeddings) have the shape in which they are stored.
    """
    if isinstance(layer, PackedProjection):
        return tuple(layer.matrix.shape)
    if isinstance(layer, DoRAQuantized) or is_quantized(layer):
        return int(layer.out_features), int(layer.in_features)  # pyright: ignore[reportArgumentType]
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def adapt_layer(
    layer: nn.Module,
    spec: DoRASpec,
    *,
    path: str = "",
    function: Forward = TORCH,
    seed: int = 0,
    name: str = "default",
) -> AdaptedLayer:
    """Adapts a layer in place, with a fresh adapter, and freezes its weight (except with method `full`).

    Args:
        layer: A layer for which `adapted_class` has a class.
        spec: The settings of the adapter.
        path: The path of the layer in its model, from which A is drawn and which error messages name.
        function: The forward function, see `backend.select`.
        seed: A is drawn from it and the path.
        name: The name of the adapter.

    Returns:
        The same object, in its new class.
    """
    base, adapted = type(layer), adapted_class(layer)
    assert adapted is not None
    object.__setattr__(layer, "__class__", adapted)
    assert isinstance(layer, AdaptedLayer)
    layer.base_class = base
    layer.spec, layer.path, layer.seed, layer.function = spec, path, seed, function
    layer.name, layer.stacked = name, {}
    layer.strength, layer.merged, layer.base_weight, layer.kept = 1.0, False, (None,), None
    layer.num_passes, layer.base_fixed, layer.base_norm = 1.0, False, None
    layer.trainable_before = layer.weight.requires_grad
    layer.weight.requires_grad_(spec.method == "full")
    for parameter in ADAPTER_NAMES:
        layer.register_parameter(parameter, None)
    layer.reset_adapter()
    return layer


_STATE = (
    *("base_class", "spec", "path", "seed", "name", "strength", "stacked", "function", "trainable_before"),
    *("merged", "base_weight", "kept", "num_passes", "base_fixed", "base_norm"),
)


def restore_layer(layer: AdaptedLayer) -> nn.Module:
    """Removes the adapter in place.

    A layer that was merged without keeping its base keeps the merged weight.

    Returns:
        The same object, in its original class.
    """
    if layer.merged and layer.base_weight[0] is not None:
        layer.unmerge()
    layer.weight.requires_grad_(layer.trainable_before)
    for name in ADAPTER_NAMES:
        del layer._parameters[name]
    base = layer.base_class
    for name in _STATE:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", base)
    return layer

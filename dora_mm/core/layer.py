"""The adapted layers for each class of base layer, and how a base layer becomes one and is restored."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from dora_mm.core.adaptation import ADAPTER_NAMES, Adaptation
from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.attention import DoRAPackedProjection, PackedProjection
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.ops import LINEAR, ConvOp, EmbeddingOp
from dora_mm.core.quantized import DoRAQuantized, is_quantized
from dora_mm.core.spec import DoRASpec
from dora_mm.core.subclasses import class_for_subclass, subclass


class DoRALinear(AdaptedLayer, nn.Linear):
    """An adapted nn.Linear: A (R, I), B (O, R), magnitude (O,)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.is_base() else self.adapted_product(input, LINEAR)


class DoRABiasLast(DoRALinear):
    """An adapted Linear that rounds x W^T before it adds the bias, as code that computes `x @ W.T + b` does."""

    def forward(self, input: Tensor) -> Tensor:
        if self.is_base():
            return super().forward(input)
        y = self.adapted_product(input, LINEAR, use_bias=False)
        return y if self.bias is None else y + self.bias


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
        return super().forward(input) if self.is_base() else self.adapted_product(input, EmbeddingOp(self.padding_idx))


# --- which class adapts a layer --------------------------------------------------------------------------------------

ADAPTED_CLASSES: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
    nn.Embedding: DoRAEmbedding,
    PackedProjection: DoRAPackedProjection,
}
ADAPTABLE = "Linear, Conv1d, Conv2d, Conv3d, Embedding, transformers' Conv1D and the projections of MultiheadAttention"


def adapted_class(layer: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted class for a layer, None where it cannot be adapted.

    A subclass of a known class may compute something else, see `class_for_subclass`. transformers' Conv1D is recognised
    by its name, since core imports only torch.
    """
    base = type(layer)
    if is_quantized(layer):
        return subclass(DoRAQuantized, base)
    if (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return DoRATransposedLinear
    if isinstance(weight := getattr(layer, "weight", None), Tensor) and type(weight) not in (Tensor, nn.Parameter):
        return None  # a subclass of Tensor, whose products compute something else
    known = next((kind for kind in ADAPTED_CLASSES if isinstance(layer, kind)), None)
    if known is None or base is known:
        return ADAPTED_CLASSES.get(base)
    if "weight" not in layer._parameters:
        return ADAPTED_CLASSES[known]  # a weight_norm, say, which inject refuses with its reason
    if getattr(base, "_conv_forward", None) is not getattr(known, "_conv_forward", None):
        return None  # what a convolution calls with its weight
    if base.forward is known.forward:
        return subclass(ADAPTED_CLASSES[known], base)
    last = DoRABiasLast if known is nn.Linear else None
    return class_for_subclass(layer, known, ADAPTED_CLASSES[known], last)


# --- adapting and restoring ------------------------------------------------------------------------------------------


def adapt_layer(
    layer: nn.Module,
    spec: DoRASpec,
    *,
    path: str = "",
    forward: Forward = TORCH,
    seed: int = 0,
    name: str = "default",
    trainable_before: bool | None = None,
) -> AdaptedLayer:
    """Adapts a layer in place, with a fresh adapter, and freezes its weight (except with method `full`).

    Args:
        layer: A layer for which `adapted_class` has a class.
        spec: The settings of the adapter.
        path: The path of the layer in its model, from which A is drawn and which error messages name.
        forward: The implementation of the layer, see `backend.select`.
        seed: A is drawn from it and the path.
        name: The name of the adapter.
        trainable_before: What `requires_grad` of the weight will be set to by `restore_layer`; None: what it is now.

    Returns:
        The same object, in its new class.
    """
    base, adapted = type(layer), adapted_class(layer)
    assert adapted is not None
    weight: nn.Parameter = layer.weight  # pyright: ignore[reportAssignmentType]
    before = weight.requires_grad if trainable_before is None else trainable_before
    object.__setattr__(layer, "__class__", adapted)
    assert isinstance(layer, AdaptedLayer)
    layer.adaptation = Adaptation(base, spec, path, seed, name, forward, before)
    weight.requires_grad_(spec.method == "full")
    for parameter in ADAPTER_NAMES:
        layer.register_parameter(parameter, None)
    try:
        layer.reset_adapter()
    except BaseException:  # no memory, say
        restore_layer(layer)
        raise
    return layer


def restore_layer(layer: AdaptedLayer) -> nn.Module:
    """Removes the adapter in place.

    A layer that was merged without keeping its base keeps the merged weight.

    Returns:
        The same object, in its original class.
    """
    state = layer.adaptation
    if state.base_weight is not None:
        layer.unmerge()
    layer.weight.requires_grad_(state.trainable_before)
    for name in ADAPTER_NAMES:
        delattr(layer, name)
    del layer.adaptation
    object.__setattr__(layer, "__class__", state.base_class)
    return layer

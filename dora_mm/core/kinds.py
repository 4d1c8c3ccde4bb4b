"""Which class adapts a layer, and how a layer becomes an adapted one and is restored."""

from __future__ import annotations

from torch import nn

from dora_mm.core.adaptation import ADAPTER_NAMES, Adaptation
from dora_mm.core.adapted import AdaptedLayer, has_dense_weight
from dora_mm.core.forms import TORCH, Forward
from dora_mm.core.full_weight import TrainedWeight
from dora_mm.core.layer import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding, DoRALinear, DoRATransposedLinear
from dora_mm.core.spec import DoRASpec
from dora_mm.core.wrappers.attention import DoRAPackedProjection
from dora_mm.core.wrappers.experts import DoRAExperts
from dora_mm.core.wrappers.quantized import DoRAQuantized
from dora_mm.core.wrappers.subclasses import KNOWN, class_for_subclass, subclass

# Asked in this order, see `AdaptedLayer.class_for`; then `class_for_subclass`.
ADAPTED_CLASSES: tuple[type[AdaptedLayer], ...] = (
    DoRAQuantized,
    DoRATransposedLinear,
    DoRALinear,
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRAEmbedding,
    DoRAPackedProjection,
    DoRAExperts,
)
ADAPTABLE = (
    "Linear, Conv1d, Conv2d, Conv3d, Embedding, transformers' Conv1D, the projections of MultiheadAttention and of "
    "experts"
)


def adapted_class(layer: nn.Module, method: str = "dora") -> type[AdaptedLayer] | None:
    """The adapted class for a layer and a method, None where it cannot be adapted."""
    found = (kind.class_for(layer) for kind in ADAPTED_CLASSES)
    kind = next((kind for kind in found if kind is not None), None) or class_for_subclass(layer)
    return subclass(TrainedWeight, kind) if kind and method == "full" else kind


def not_adaptable(layer: nn.Module) -> str:
    """A description, for error messages, of a layer without an adapted class; it depends on the layer's class alone."""
    base = next((known for known in KNOWN if isinstance(layer, known)), None)
    if base is None or not has_dense_weight(layer):
        return f"a {type(layer).__name__}, which cannot be adapted ({ADAPTABLE} can)"
    return (
        f"a {type(layer).__name__}, which cannot be adapted: it is a {base.__name__} with a forward of its own, which "
        "may do anything with the weight"
    )


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
    base, adapted = type(layer), adapted_class(layer, spec.method)
    assert adapted is not None
    weight: nn.Parameter = layer.weight  # pyright: ignore[reportAssignmentType]
    before = weight.requires_grad if trainable_before is None else trainable_before
    object.__setattr__(layer, "__class__", adapted)
    assert isinstance(layer, AdaptedLayer)
    layer.adaptation = Adaptation(base, spec, path, seed, name, forward, before)
    weight.requires_grad_(issubclass(adapted, TrainedWeight))
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

"""The layers of PEFT: what a pass reads of them, and the variants of DoRA whose forward pass is `formula.Scaled`.

PEFT calls the variant of an adapter with the output of its base layer, or of the adapter before. Ours are subclasses of
its own, which merge, unmerge and initialise as they do. PEFT says that this place may change: see `check_version`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora, variants
from torch import Tensor, nn

from dora_mm.core.ops import LINEAR, ConvOp, Op
from dora_mm.core.wrappers.quantized import dequantized
from dora_mm.peft.formula import Scaled, gains

DROPS = "dropout in training, where a second large product is taken"
NOT_AT_HAND = (
    "parameters that are sharded (but not where FSDP2 gathers them for the pass), offloaded, parametrized or of an "
    "unknown class"
)
HOOKS = "hooks on lora_A, lora_B or lora_magnitude_vector, which a fused pass would not call as PEFT's does"


class PassTensors(NamedTuple):
    """What a pass reads of one adapter of one layer, as PEFT holds it: conv kernels with all their dimensions."""

    weight: Any
    bias: Tensor | None
    A: Any
    B: Any
    magnitude: Any
    scaling: float
    transposed: bool

    def state(self) -> tuple[Any, ...]:
        """What most changes of what g depends on change; writing to `.data` does not."""
        tensors = (self.weight, self.A, self.B, self.magnitude)
        return (self.scaling, *(t.data_ptr() for t in tensors), *(t._version for t in tensors))


def read(layer: Any, name: str) -> PassTensors | str:
    """What a pass reads, or why it runs PEFT's own code.

    Modules and parameters come from their dictionaries: attributes of a Module take several times as long.
    """
    own = layer._modules
    magnitude, is_embedding = own["lora_magnitude_vector"]._modules[name], name not in own["lora_A"]._modules
    if is_embedding:
        A, B, hooked = layer.lora_embedding_A[name], layer.lora_embedding_B[name], has_hooks(magnitude)
    else:
        if layer.training and drops(layer, name):
            return DROPS
        reduces, expands = own["lora_A"]._modules[name], own["lora_B"]._modules[name]
        A, B = reduces._parameters.get("weight"), expands._parameters.get("weight")
        hooked = has_hooks(magnitude) or has_hooks(expands) or has_hooks(reduces)
    if hooked:
        return HOOKS
    base = layer.get_base_layer()
    weight, m = base._parameters.get("weight"), magnitude._parameters.get("weight")
    at_hand = is_at_hand(A) and is_at_hand(B) and is_at_hand(m) and (is_at_hand(weight) or is_quantized(weight))
    if not at_hand or hasattr(m, "ds_id"):  # DeepSpeed's ZeRO-3 gathers a module's parameters for its own pass only
        return NOT_AT_HAND
    transposed = is_embedding or getattr(layer, "fan_in_fan_out", False)
    return PassTensors(weight, base._parameters.get("bias"), A, B, m, layer.scaling[name], transposed)


def tensors_of(layer: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and m of an adapter, wherever they are."""
    m = layer.lora_magnitude_vector[name].weight
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight, m
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name], m


def has_hooks(module: Any) -> bool:
    """Whether something is to be called with this module. PEFT calls lora_A for the norm, too."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def drops(layer: Any, name: str) -> bool:
    """Whether an adapter has dropout, which PEFT's embeddings with DoRA ignore."""
    own = layer._modules
    return not isinstance(own["lora_dropout"]._modules[name], nn.Identity) and name in own["lora_A"]._modules


def is_at_hand(t: Any) -> bool:
    """Whether a parameter is a plain one with all its numbers: no DTensor, not on `meta`, not of size 0."""
    return type(t) is nn.Parameter and t.is_floating_point() and not t.is_meta and t.numel() > 0


def is_quantized(weight: Any) -> bool:
    """Whether this is a weight of bitsandbytes or torchao, in four or eight bits."""
    return type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")


class StepRows(NamedTuple):
    """What `gains` computes, and the state of the parameters that it is of."""

    gain: Tensor
    divisor: Tensor
    state: tuple[Any, ...]


@torch.no_grad()
def rows_of(layer: Any, found: PassTensors) -> StepRows:
    """Computes g from the parameters as they are."""
    with torch.autocast(found.A.device.type, enabled=False):
        W0 = found.weight if is_at_hand(found.weight) else dequantized(layer.get_base_layer())
        A, B, m = found.A.flatten(1), found.B.flatten(1), found.magnitude.flatten()
        return StepRows(*gains(W0.flatten(1), A, B, m, found.scaling, found.transposed), found.state())


class FusedDoRA:
    """What our variants have in common. An instance belongs to one adapter of one layer.

    Attributes:
        op: What the layer does with h.
        step_rows: What all passes inside `fixed_norms` share.
    """

    op: Op = LINEAR
    step_rows: StepRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a layer is in no context."""
        return {}

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The output of an adapter, `result` being that of the base layer or of the adapter before. PEFT calls it."""
        found = read(module, active_adapter)
        if isinstance(found, str):
            stock: Any = super()
            return stock.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
        h, rows = self.reduced(module, active_adapter, x), self.rows(module, active_adapter, found)
        if rows is None and not is_at_hand(found.weight):  # torch.compile cannot trace this
            rows = rows_of(module, found)
        gain, divisor, W0, A = None, None, None, None
        if rows is None:
            W0, A = found.weight.flatten(1), found.A.flatten(1)
        else:
            gain, divisor, _ = rows
        B, m, dtype = found.B.flatten(1), found.magnitude.flatten(), output_dtype(module, result, found.magnitude)
        given = gain, divisor, W0, A, found.transposed, found.scaling, dtype
        return Scaled.apply(self.op, result, found.bias, h, B, m, *given)

    def reduced(self, layer: Any, name: str, x: Tensor) -> Tensor:
        """Returns h, as PEFT computes it."""
        return layer.lora_A[name](x)

    def rows(self, layer: Any, name: str, found: PassTensors) -> StepRows | None:
        """Returns what is kept, if it is of the parameters as they are; else None."""
        kept = self.step_rows
        if kept is not None and (torch.compiler.is_compiling() or kept.state == found.state()):
            return kept
        cache = layer.lora_magnitude_vector[name]
        if not dora.ENABLE_DORA_CACHING or cache.training:
            if cache._dora_cache:
                cache._cache_clear()
            return None
        key = f"fused-rows-{name}"  # as PEFT itself keeps norms in inference
        kept = cache._cache_get(key, None)
        if kept is None or kept.state != found.state():
            kept = rows_of(layer, found)
            cache._cache_store(key, kept)
        return kept


class FusedLinear(FusedDoRA, variants.DoraLinearVariant):
    """DoRA of Linear and of transformers' Conv1D, also quantised."""


class FusedEmbedding(FusedDoRA, variants.DoraEmbeddingVariant):
    """DoRA of Embedding, which may scale what it looks up."""

    def reduced(self, layer: Any, name: str, x: Tensor) -> Tensor:
        """Returns h, as PEFT computes it."""
        h, scale = layer._embed(x, layer.lora_embedding_A[name].T), layer._get_embed_scale()
        return h if scale is None else h * scale.to(h.dtype)


class FusedConv1d(FusedDoRA, variants.DoraConv1dVariant):
    """DoRA of Conv1d."""

    op = ConvOp((1,), (0,), (1,))


class FusedConv2d(FusedDoRA, variants.DoraConv2dVariant):
    """DoRA of Conv2d."""

    op = ConvOp((1, 1), (0, 0), (1, 1))


class FusedConv3d(FusedDoRA, variants.DoraConv3dVariant):
    """DoRA of Conv3d."""

    op = ConvOp((1, 1, 1), (0, 0, 0), (1, 1, 1))


def output_dtype(layer: Any, y: Tensor, magnitude: Tensor) -> torch.dtype:
    """That of PEFT's own variant; or that of y, where nothing but PEFT's cast to it would follow."""
    is_cast = not type(layer).__module__.endswith(".bnb") and len(layer.active_adapters) == 1
    return y.dtype if is_cast else torch.promote_types(y.dtype, magnitude.dtype)

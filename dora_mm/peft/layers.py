"""The layers of PEFT: what a pass reads of them, and the variants of DoRA whose forward pass is `formula.Scaled`.

PEFT calls the variant of an adapter with the output of its base layer, or of the adapter before. Ours are subclasses of
its own, which merge, unmerge and initialise as they do. PEFT documents that this API may change: see `check_version`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import variants
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dora_mm.core.functional import can_read, without_autocast
from dora_mm.core.inference import is_inference, storages_of, versions_of
from dora_mm.core.ops import LINEAR, ConvOp, Op
from dora_mm.core.wrappers.quantized import dequantized
from dora_mm.peft.formula import RowFactors, Scaled, output, prepared, row_factors, runs_in_triton, with_products

DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
PADS = "with dropout in training over a convolution whose padding is not zeros, where PEFT's product pads with zeros"
NOT_AT_HAND = (
    "with parameters that are sharded (but not where FSDP2 gathers them for the pass), offloaded, parametrized, in "
    "float8, or of an unknown class"
)
HOOKS = "with hooks on lora_A, lora_B or lora_magnitude_vector, which a fused pass would not call as PEFT's does"


class PassTensors(NamedTuple):
    """The inputs of a pass from one adapter of one layer, as PEFT stores them: conv kernels with all dimensions."""

    weight: Any
    bias: Tensor | None
    A: Any
    B: Any
    magnitude: Any
    scaling: float
    transposed: bool
    dropout: nn.Module | None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors that g and (1 - g) b depend on, besides the scaling."""
        return self.weight, self.A, self.B, self.magnitude, self.bias


def read(layer: Any, name: str) -> PassTensors | str:
    """Reads the inputs of a pass; returns a text, the reason, where the pass must run PEFT's own code.

    Modules and parameters come from their dictionaries: attributes of a Module take several times as long.
    """
    own, dropout = layer._modules, None
    base = own["base_layer"] if "base_layer" not in own["base_layer"]._modules else layer.get_base_layer()
    magnitude, is_embedding = own["lora_magnitude_vector"]._modules[name], name not in own["lora_A"]._modules
    if is_embedding:
        A, B, hooked = layer.lora_embedding_A[name], layer.lora_embedding_B[name], has_hooks(magnitude)
    else:
        if layer.training and drops(layer, name):
            dropout = own["lora_dropout"]._modules[name]
            if getattr(base, "padding_mode", "zeros") != "zeros":
                return PADS
        reduces, expands = own["lora_A"]._modules[name], own["lora_B"]._modules[name]
        A, B = reduces._parameters.get("weight"), expands._parameters.get("weight")
        hooked = has_hooks(magnitude) or has_hooks(expands) or has_hooks(reduces)
    if hooked:
        return HOOKS
    weight, m = base._parameters.get("weight"), magnitude._parameters.get("weight")
    at_hand = is_at_hand(A) and is_at_hand(B) and is_at_hand(m) and (is_at_hand(weight) or is_quantized(weight))
    if not at_hand or hasattr(m, "ds_id"):  # DeepSpeed's ZeRO-3 gathers a module's parameters for its own pass only
        return NOT_AT_HAND
    transposed = is_embedding or getattr(layer, "fan_in_fan_out", False)
    return PassTensors(weight, base._parameters.get("bias"), A, B, m, layer.scaling[name], transposed, dropout)


def num_weights(A: Tensor, B: Tensor) -> int:
    """The number of weights of a layer, also of a quantised one."""
    return A.numel() // max(A.shape[0], 1) * B.shape[0]


def crossing(dtype: torch.dtype, tokens: int) -> int:
    """The number of weights from which on a fused pass that computes its norms is faster than PEFT's, on a CPU.

    It errs on PEFT's side: on one thread of two AMD EPYC, Zen 4 (with AVX-512, and limited to AVX2) and Zen 5, no pass
    above it takes more than 1.01 times PEFT's (tests/benchmarks/results/crossing).

    Args:
        dtype: That of the layer's output.
        tokens: T.
    """
    single = 2**16 if tokens < 256 else 2**15 if tokens < 1024 else 2**14
    return single if dtype.itemsize >= 4 else 2 * single


def small_passes(found: PassTensors) -> str | None:
    """The passes of a layer that may be as fast in PEFT's own code, by `crossing`; None: there are none."""
    size, dtype, under = num_weights(found.A, found.B), found.weight.dtype, ""
    if found.magnitude.device.type != "cpu" or not is_at_hand(found.weight):
        return None
    if size >= crossing(dtype, 1):
        dtype, under = torch.bfloat16, " under autocast"
    if size >= crossing(dtype, 1):
        return None
    fused_from = next((tokens for tokens in (256, 1024) if size >= crossing(dtype, tokens)), None)
    passes = f"in training passes of fewer than {fused_from:,} tokens" if fused_from else "in training passes"
    return (
        f"{passes} on a CPU{under}, where it is as fast for layers this small. Evaluation, GPUs and fixed_norms run "
        "them fused"
    )


def has_zero_rows(found: PassTensors) -> bool:
    """Whether rows of the base weight, which is at hand, are zeros."""
    return bool((found.weight.flatten(1) == 0).all(0 if found.transposed else 1).any())


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
    """Whether a parameter is a plain one with all its numbers: no DTensor, not on `meta`, not of size 0.

    Those in 8 bits are not: their scales lie elsewhere.
    """
    return type(t) is nn.Parameter and t.dtype in DTYPES and not t.is_meta and t.numel() > 0


def is_quantized(weight: Any) -> bool:
    """Whether this is a weight of bitsandbytes or torchao, in four or eight bits."""
    return type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")


class KeptRows(NamedTuple):
    """The row factors that one pass has computed for others.

    Attributes:
        rows: The row factors.
        state: Their inputs: scaling and versions of the parameters, see `versions_of`, and whether in
            training, which takes nothing from evaluations: they may run with averages that are written to `.data`.
        storages: See `storages_of`.
    """

    rows: RowFactors
    state: tuple[Any, ...]
    storages: Sequence[StorageWeakRef]


def rows_of(op: Op, layer: Any, found: PassTensors) -> RowFactors:
    """Computes what a pass needs of its rows from the parameters as they are."""
    with torch.no_grad(), without_autocast(found.A.device):
        W0 = found.weight if is_at_hand(found.weight) else dequantized(layer.get_base_layer())
        A, B, m = found.A.flatten(1), found.B.flatten(1), found.magnitude.flatten()
        rows = row_factors(W0.flatten(1), A, B, m, found.bias, found.scaling, found.transposed)
        return rows if runs_in_triton(op, A) else with_products(rows, B, found.scaling)


class FusedDoRA:
    """Base class of our variants. An instance belongs to one adapter of one layer.

    Attributes:
        op: The operations on h: those of a Linear, or of a convolution with kernel size 1.
        has_zero_rows: Whether a small weight had some when it was fused; their outputs are NaN in PEFT.
        is_fixed: Whether parameters do not change: inside `fixed_norms`.
        kept: The row factors that passes inside of it share, and those of inference.
    """

    op: Op = LINEAR
    has_zero_rows: bool = False
    is_fixed: bool = False
    kept: KeptRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a layer is in no context."""
        return {"has_zero_rows": self.has_zero_rows}

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The output of an adapter, `result` being that of the base layer or of the adapter before. PEFT calls it."""
        found = read(module, active_adapter)
        kept = None if isinstance(found, str) else self.kept_rows(module, found)
        if isinstance(found, str) or (kept is None and self.is_small(found, result)):
            stock: Any = super()
            return stock.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
        y, base, dtype = result, None, output_dtype(module, result, found.magnitude)
        if found.dropout is not None:
            x, base = found.dropout(x), result
            y = base_output(module.get_base_layer(), found.weight, x)
        h, B = self.reduced(module, active_adapter, x), found.B.flatten(1)
        rows = rows_of(self.op, module, found) if kept is None else kept
        if not torch.is_grad_enabled():
            rows = prepared(self.op, y, B, rows, found.scaling, base)
            return output(self.op, y, h, B, rows, found.scaling, dtype, base)
        return Scaled.apply(self.op, y, found.bias, h, B, found.magnitude.flatten(), base, rows, found.scaling, dtype)

    def reduced(self, layer: Any, name: str, x: Tensor) -> Tensor:
        """Returns h, as PEFT computes it."""
        return layer._modules["lora_A"]._modules[name](x)

    def is_small(self, found: PassTensors, result: Tensor) -> bool:
        """Whether PEFT's own pass is as fast as one that computes its norms."""
        is_on_cpu = result.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.has_zero_rows or not is_on_cpu or not is_at_hand(found.weight):
            return False
        size = num_weights(found.A, found.B)
        return size < crossing(result.dtype, result.numel() // max(found.magnitude.numel(), 1))

    def kept_rows(self, layer: Any, found: PassTensors) -> RowFactors | None:
        """Returns what passes share, if parameters are as they were; None where this pass computes it for itself.

        A pass of training drops what one of inference has kept: trainers may write to `.data`. So FSDP2 may, which
        gathers parameters in each pass, into the same memory: with several processes inference keeps nothing.
        """
        if not can_read(found.A):  # graphs, of torch.compile and of CUDA, cannot see that parameters have changed
            return None
        kept, versions = self.kept, None
        if self.is_fixed or is_inference(layer):
            versions = versions_of(found.tensors)
        if versions is None:
            if kept is not None:
                self.kept = None
            return None
        state = layer.training, found.scaling, versions
        if kept is None or kept.state != state:
            with torch.inference_mode(False):  # passes with gradients may use them, too
                self.kept = kept = KeptRows(rows_of(self.op, layer, found), state, storages_of(found.tensors))
        return kept.rows


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


def base_output(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The output of a base layer, without its hooks: they were called in this pass.

    PEFT casts x to the dtype of A. Layers in 4 and 8 bits cast it themselves.
    """
    return type(base).forward(base, x.to(weight.dtype) if weight.is_floating_point() else x)


def output_dtype(layer: Any, y: Tensor, magnitude: Tensor) -> torch.dtype:
    """The output dtype of PEFT's own variant; or that of y, where nothing but PEFT's cast to it would follow."""
    is_cast = not type(layer).__module__.endswith(".bnb") and len(layer.active_adapters) == 1
    return y.dtype if is_cast else torch.promote_types(y.dtype, magnitude.dtype)

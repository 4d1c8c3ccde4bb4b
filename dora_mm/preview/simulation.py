"""The memory of a training step without its numbers: all of it runs on the meta device, and tensors are counted.

Networks are there without weights. What their inputs alone decide (token ids, positions of images, masks, sizes) is
computed; whatever depends on a weight has a shape only. Where a class asks such a number for a decision, the answer is
1 or True, but no where it asks for any (of what is unusual: infinite numbers, small gains) or for a certain one. So
every tensor of the forward and the backward pass is made and dropped as in a step, and what is there at once is the
step's memory, but for what kernels take inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dora_mm.core import AdaptedLayer, fixed_parameters
from dora_mm.core.forms import adapted_product
from dora_mm.core.functional import Adapter, cast
from dora_mm.core.ops import LINEAR
from dora_mm.core.passes import Options
from dora_mm.core.steps import Steps, branch, has_magnitude
from dora_mm.utils.losses import LossSum

META = torch.device("meta")
INDEX_ARGUMENTS = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
# What autocast computes in half precision, and on a GPU in float32, as far as networks do it: see ATen/autocast_mode.h
AUTOCAST = {F: ("linear", "conv1d", "conv2d", "conv3d"), torch: ("matmul", "mm", "bmm", "addmm", "baddbmm")}
IN_FLOAT = {F: ("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "interpolate"), torch: ("softmax",)}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


def simulated_peak(
    networks: Mapping[str, nn.Module],
    loss: Callable[[Any], LossSum],
    batch: Any,
    num_passes: int = 1,
    machine: Machine | None = None,
) -> int:
    """The bytes that a step takes at most beyond the networks' own parameters and buffers, gradients included.

    Args:
        networks: All networks, adapted, on the meta device, as they are trained: in training mode, what is frozen
            without gradients. Their adapted layers are left with another forward function.
        loss: The loss of a batch.
        batch: A batch, on the processor; not counted.
        num_passes: Forward passes of an optimizer step.
        machine: What the step is simulated for; None: a processor, without autocast.

    Raises:
        Exception: A class does something with a number that is not there.
    """
    model, machine = nn.ModuleDict(networks), machine or Machine()
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            layer.adaptation.forward = machine.product
    counted = Simulation((*model.parameters(), *model.buffers()))
    replaced = replacing(torch, "tensor", partial(_lists, torch.tensor)), fused_attention(machine)
    with counted, machine.autocast(), replaced[0], replaced[1], fixed_parameters(model, num_passes=num_passes):
        torch.autograd.backward(loss(batch).total)
    return counted.peak


@dataclass(frozen=True)
class Machine:
    """The hardware and precision that a step is simulated for.

    Attributes:
        is_gpu: A GPU, where other operations are autocast than on a CPU.
        dtype: The dtype of autocast; None: there is none.
        triton: Linear layers run in Triton, as they do on usual GPUs.
    """

    is_gpu: bool = False
    dtype: torch.dtype | None = None
    triton: bool = False

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Casts what torch's autocast would, which leaves the meta device alone: so autograd keeps what it keeps."""
        both = [] if self.dtype is None else [(self.dtype, AUTOCAST), (torch.float32, IN_FLOAT if self.is_gpu else {})]
        with ExitStack() as replaced:
            for dtype, functions in both:
                for owner, name in ((owner, name) for owner, names in functions.items() for name in names):
                    replaced.enter_context(replacing(owner, name, partial(self._cast, getattr(owner, name), dtype)))
            yield

    def _cast(self, function: Callable[..., Tensor], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
        """Calls a function; in backward passes, and in those of adapted layers, as it is."""
        if torch.is_grad_enabled():  # also where checkpointing computes again
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        return function(*args, **kwargs)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], options: Options
    ) -> Tensor:
        """An adapted layer; what it computes inside is not autocast."""
        in_triton = self.triton and options.op is LINEAR and not (options.dropout and has_magnitude(adapters))
        if self.dtype is not None and options.op.merges:
            options = options._replace(dtype=self.dtype)
        steps = TritonLikeSteps() if in_triton else ReadableSteps()
        return adapted_product(x, weight, bias, adapters, options, steps)


class ReadableSteps(Steps):
    """Layer passes that keep y as in a real training, although values on the meta device cannot be read."""

    def keeps_output(self, x: Tensor) -> bool:
        return True


class TritonLikeSteps(ReadableSteps):
    """Layer passes as in kernels/: W(t) is never built, and the branch is added without a tensor of its own."""

    only_unmerged = True

    def product(self, options, dtype, x, source, weight, bias, adapters, operand):
        A, h = branch(adapters)[0], None
        if A is not None:
            h = options.op.reduce(source, cast(A, dtype))
        return options.op(x, cast(weight, dtype), bias), h


class Simulation(TorchDispatchMode):
    """Runs operations without numbers, and counts the bytes of the tensors that they make.

    Tensors on the processor are computed; they meet those on the meta device as if they were there.

    Args:
        known: Tensors that are not counted.

    Attributes:
        peak: The most bytes that were there at once.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = dict.fromkeys((t.untyped_storage()._cdata for t in known), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(t.is_meta for t in found):
            output = self._shaped(func, args, kwargs)
        else:
            output = func(*args, **_on_processor(func, found, kwargs))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return output

    def _shaped(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The output of an operation one of whose inputs has no numbers."""
        name = func.__name__.partition(".")[0]
        if name == "_local_scalar_dense":
            number = args[0].dtype
            return True if number == torch.bool else 1.0 if number.is_floating_point else 1
        if name == "any" if len(args) == 1 else name == "eq" and args[0].dim() == 0:
            return torch.zeros((), dtype=torch.bool)
        if name == "nonzero":
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=META)
        if name in INDEX_ARGUMENTS:
            args = (args[0], [argument for index in args[1] for argument in _indices(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, _without_numbers, (args, kwargs))
        if name == "_grouped_mm":  # of experts; on the meta device it takes bfloat16 alone
            return _grouped_product(*args[:3])
        if name in PRODUCTS:  # nothing is autocast on the meta device
            args = _in_one_dtype(args)
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)

    def _count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _lists(tensor: Callable[..., Tensor], data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.tensor`, which leaves the numbers of lists on the processor; no operation shows it."""
    return tensor(data, *args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == META else kwargs))


def _on_processor(func: Any, found: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which what depends on no weight stays on the processor, where it can be computed."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is None or torch.device(device) != META:
        return kwargs
    counts = func.__name__.startswith("arange") or (dtype is not None and not dtype.is_floating_point)
    return {**kwargs, "device": torch.device("cpu")} if found or counts else kwargs


def _indices(index: Tensor | None) -> Iterable[Tensor | None]:
    """The integer indices of an index that may be a mask; a mask without values counts as all True."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    if index.is_meta:
        return [torch.empty(index.numel(), dtype=torch.long, device=META) for _ in range(index.dim())]
    return index.nonzero().unbind(1)


def _without_numbers(t: Tensor) -> Tensor:
    if t.is_meta or t.dim() == 0:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)


def _grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The shape of x (T, I) times weights (E, I, O), or of the gradient (E, I, O) of x (I, T) and y (T, O)."""
    shape = (len(x), weight.shape[-1]) if weight.dim() == 3 else (len(offsets), len(x), weight.shape[-1])
    return torch.empty(shape, dtype=x.dtype, device=META)


def _in_one_dtype(args: Any) -> Any:
    dtypes = {t.dtype for t in args if isinstance(t, Tensor)}
    if len(dtypes) == 1:
        return args
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    return tree_map_only(Tensor, lambda t: t.to(narrowest), args)


# --- attention -------------------------------------------------------------------------------------------------------


class FusedAttention(torch.autograd.Function):
    """Attention that saves the tensors of a fused kernel: q, k, v, output, log-sum-exp, and a mask."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, *(() if mask is None else (mask,)))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _, _, *mask = ctx.saved_tensors
        found = [torch.empty_like(t) for t in (query, key, value, *mask)]
        return (*found[:3], found[3] if ctx.needs_input_grad[3] else None)


@contextmanager
def fused_attention(machine: Machine) -> Iterator[None]:
    """Attention on the meta device as kernels compute it, which would else keep its matrices there.

    On a processor there is none with dropout, nor with a mask that has gradients.
    """
    own, dtype = F.scaled_dot_product_attention, machine.dtype

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
    ) -> Tensor:
        is_unfused = not machine.is_gpu and (dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad))
        if not query.is_meta or query.dim() != 4 or is_unfused:
            return own(query, key, value, attn_mask, dropout_p, **more)
        if dtype is not None and torch.is_grad_enabled():
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # kernels add it
        return FusedAttention.apply(query, key, value, attn_mask)

    with replacing(F, "scaled_dot_product_attention", attention):
        yield


@contextmanager
def replacing(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a function of a module of torch."""
    own = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, own)

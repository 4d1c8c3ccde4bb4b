"""A device named `card`: its tensors say that they are on it, hold values on the CPU, and refuse to meet its tensors.

It is a backend for torch's `PrivateUse1` written in Python. What torch computes with one of its tensors arrives at
`GpuTensor.__torch_dispatch__`, below autograd, and is computed by the CPU's kernels: results are those of the CPU bit
for bit, unless the program itself does something else on an accelerator. An operation over both devices raises, as on
a GPU, and what is read back is counted by the line of the program that asked for it.

`install` changes torch for the rest of the process and cannot be undone: tests run it in a process of their own.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu import streams

NAME = "card"
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = tuple(str(ROOT / folder) + "/" for folder in ("dora_mm", "pipelines"))

aten = torch.ops.aten
# A copy may go from one device to the other. Indices may stay on the CPU; CUDA moves them by itself.
CROSSES = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
CROSSES |= {aten._index_put_impl_.default, aten._foreach_copy_.default}
# Their result depends on values in a way that the host waits for: a number, or the size of a tensor.
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
WAITS |= {
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}

# What autocast does in half precision on the CPU.
AUTOCAST = (
    "conv1d",
    "conv2d",
    "conv3d",
    "bmm",
    "mm",
    "linalg_vecdot",
    "baddbmm",
    "addmm",
    "addbmm",
    "linear",
    "matmul",
)
AUTOCAST += ("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "scaled_dot_product_attention")
# By themselves they make an empty tensor and let it grow, and the size of a tensor of the GPU is fixed.
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "tril_indices", "triu_indices")
OWN_KERNELS = ("silu_backward", "mish_backward", "native_channel_shuffle")  # the CPU has; elsewhere torch composes them
FLASH = 1  # of torch._fused_sdp_choice


class TwoDevicesError(RuntimeError):
    """An operation met tensors of the GPU and of the CPU."""


class GpuTensor(Tensor):
    """A tensor whose device is `card`, and whose values are in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "GpuTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        streams.memory.know(held)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it for subclasses

    @property
    def data(self) -> Tensor:
        return GpuTensor(self.held)

    @data.setter
    def data(self, value: "GpuTensor") -> None:
        Tensor.data.__set__(self, value)  # what torch knows of it: shape, strides, dtype
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return streams.GpuStorage(self.held.untyped_storage())

    def _typed_storage(self) -> Any:
        return self.held._typed_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_two_devices(func, args, kwargs)
        wanted = kwargs.get("device")
        to_cpu = wanted is not None and torch.device(wanted).type == "cpu"
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        given = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, GpuTensor)}
        args_held, kwargs_held = tree_map(_held, (args, kwargs))
        _count(func, args, args_held, to_cpu)
        if streams.current[-1] is not streams.FIRST and func is aten.copy_.default:
            streams.copy_later(args_held[0], args_held[1])
            return args[0]
        streams.memory.check(func, [t.held for t in given.values()])
        result = func(*args_held, **kwargs_held)
        if to_cpu:
            return tree_map(lambda t: t.clone() if id(t) in given else t, result)
        if func is aten.copy_.default and not isinstance(args[0], GpuTensor):
            return args[0]
        return tree_map(lambda t: _on_gpu(t, given), result)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, GpuTensor) else value


def _on_gpu(value: Any, given: dict[int, GpuTensor]) -> Any:
    """A result as a tensor of the GPU: the one that was given, where the operation changes it in place."""
    if not isinstance(value, Tensor):
        return value
    if id(value) not in given:
        return GpuTensor(value.resolve_conj().resolve_neg())  # the card's tensor has no such marks
    same = given[id(value)]
    assert same.shape == value.shape, "an operation changed the shape of a tensor in place"
    return same


def _refuse_two_devices(func: Any, args: Any, kwargs: Any) -> None:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    others = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim()]  # numbers may come from the CPU
    if others and func not in CROSSES:
        shown = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in tensors)
        raise TwoDevicesError(f"{func} over two devices: {shown}")
    drawn_by = kwargs.get("generator")
    if drawn_by is not None and places.get(drawn_by._cdata) != NAME:
        raise TwoDevicesError(f"{func} on the GPU with a generator of the CPU")


waits: Counter[str] = Counter()


def _count(func: Any, args: Any, held: Any, to_cpu: bool) -> None:
    """Counts what the host waits for, by the line of the program that asked for it."""
    leaves = list(tree_leaves(held))
    by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
        t.dtype == torch.bool for t in leaves[1:] if isinstance(t, Tensor)
    )
    comes_back = to_cpu or (func is aten.copy_.default and not isinstance(args[0], GpuTensor))
    if func in WAITS or by_mask or comes_back:
        waits[f"{func.overloadpacket.__name__} {_asker()}"] += 1


def _asker() -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PROGRAM):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_name}"


places: dict[int, str] = {}  # where each generator is: torch hands on the one that is inside, which is the CPU's


class GpuGenerator(torch.Generator):
    """A generator that says where it is asked to be, and draws what the CPU's would."""

    def __new__(cls, device: Any = "cpu") -> "GpuGenerator":
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        places[made._cdata] = made.place.type
        return made

    def __init__(self, device: Any = "cpu"):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self.place


class GpuModule:
    """What torch asks of `torch.card`."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass  # all is drawn by generators of the CPU

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return streams.CAPACITY - streams.memory.now, streams.CAPACITY

    @staticmethod
    def current_stream(device: Any = None) -> streams.GpuStream:
        return streams.current[-1]

    Stream, Event = streams.GpuStream, streams.GpuEvent
    stream = staticmethod(streams.stream)


_registered: list[torch.library.Library] = []  # they stay as long as they are referenced


def install() -> None:
    """Registers the device, and makes it the one that accelerate finds."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, GpuModule())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
        library.impl("dropout", _dropout, key)
    for name in OWN_KERNELS:
        library.impl(name, _own_kernel(name), "PrivateUse1")
    for name in AUTOCAST:
        library.impl(name, _autocast(name), "AutocastPrivateUse1")
    library.impl("_local_scalar_dense", _number, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        library.impl(name, _factory(name), "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # all others keep their dtype
    _registered.extend([library, others])
    torch.Generator = GpuGenerator
    torch.clear_autocast_cache = _forget_casts  # which autocast calls when it ends
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # parameters stay the objects that they are, as on a GPU
    import accelerate

    from dora_mm.core import adapted

    adapted.type = _class_on_a_gpu
    accelerate.PartialState.default_device = property(lambda self: torch.device(NAME, 0))


def _class_on_a_gpu(value: Any) -> type:
    """The class that a tensor would have on a GPU: layers are adapted by the exact class of their weight."""
    if not isinstance(value, GpuTensor):
        return type(value)
    return torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else Tensor


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return GpuTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return GpuTensor(torch.empty_strided(size, stride, dtype=dtype))


def _number(held: Tensor) -> Any:
    """What `torch.tensor` of a list of tensors reads; it bypasses subclasses."""
    return GpuTensor.__torch_dispatch__(aten._local_scalar_dense.default, (), (held,))


def _factory(name: str) -> Any:
    def made(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return GpuTensor(getattr(aten, name.split(".")[0])(*args, **kwargs))

    return made


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(values, device="card")` copies by."""
    _held(target).copy_(_held(source))
    return target


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch computes on the CPU; by itself it chooses by the device."""
    _refuse_two_devices("scaled_dot_product_attention", (q, k, v, mask), {})
    held = [_held(t.detach()).requires_grad_(t.requires_grad) for t in (q, k, v)]
    settings = {"scale": scale, "enable_gqa": enable_gqa}
    chosen = torch._fused_sdp_choice(*held, None if mask is None else _held(mask.detach()), dropout, causal, **settings)
    if chosen != FLASH:
        return aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, **settings)[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, attn_mask=mask, scale=scale)[0]


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """As torch composes it for the CPU; a GPU has a kernel that keeps a mask instead of factors."""
    if p == 0 or not train or not x.numel():
        return x
    return x * (torch.empty_like(x).bernoulli_(1 - p).div_(1 - p) if p < 1 else torch.zeros_like(x))


def _own_kernel(name: str) -> Any:
    return lambda *args: GpuTensor.__torch_dispatch__(getattr(aten, name).default, (), args)


_casts: dict[int, tuple[Tensor, Tensor]] = {}  # of weights, by id: autocast casts each once


def _forget_casts() -> None:
    _casts.clear()


def _autocast(name: str) -> Any:
    """An operation as autocast does it: in its dtype."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        if not isinstance(value, GpuTensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if not (value.requires_grad and value.is_leaf and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in _casts:
            _casts[id(value)] = value, value.to(dtype)
        return _casts[id(value)][1]

    def operation(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(aten, name.split(".")[0])(*tree_map(cast, args), **tree_map(cast, kwargs))

    return operation

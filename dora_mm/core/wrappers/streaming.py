"""Frozen weights that wait in main memory, and are on the device only while their block computes.

A block is a module that a network calls in every pass, such as a transformer block. Its frozen matrices keep their
shape, dtype and device, and lose their memory: the storage of each has no bytes until the block is called, gets them
from main memory on a stream of its own, and loses them when another block runs. Autograd saves weights and views of
them by their storage, so the backward pass finds what was brought again: no pass knows that its weights are streamed,
and results are those of weights that stay, bit for bit. Nothing is copied back but what `merge` has written.

While a block computes, the one that followed it in the pass before is copied. At most these two are on the device.

The backward pass of a block begins with the gradient of its output. Of all nodes that are ready, autograd runs the one
that was made last (its sequence number is the highest), so that by then the blocks that were called later are done.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)
ALIGNMENT = 256  # bytes, between matrices in main memory


class Matrix(NamedTuple):
    """A tensor that is streamed.

    Attributes:
        storage: Its memory on the device.
        on_device: All bytes of it.
        waiting: Its bytes in main memory.
    """

    storage: torch.UntypedStorage
    on_device: Tensor
    waiting: Tensor


class StreamedBlock:
    """The frozen matrices of a block, which are moved to main memory.

    Vectors stay on the device, such as biases, norms and scales of rows: they are a thousandth of a block.

    Args:
        module: The block, on any device; it is moved to that of the window.
        window: The window through which it is streamed.
    """

    def __init__(self, module: nn.Module, window: Window):
        self.window, self.number, self.arrives = window, 0, None
        module.to(window.device)
        tensors = [_dense(t) for t in streamed_tensors(module)]
        ends = [0]
        for t in tensors:
            ends.append(ends[-1] + -(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT)
        waiting = main_memory(self, ends[-1], window.device)
        self.matrices = [_moved(t, waiting[start:]) for t, start in zip(tensors, ends, strict=False)]
        module.register_forward_pre_hook(lambda *_: window.before(self))
        module.register_forward_hook(self._after, with_kwargs=True)
        for inside in module.modules():
            _BLOCKS[inside] = self

    @property
    def num_bytes(self) -> int:
        """The bytes that are streamed."""
        return sum(len(matrix.waiting) for matrix in self.matrices)

    def fill(self) -> None:
        """Gives the matrices memory on the device, and copies them there on the current stream."""
        for storage, on_device, waiting in self.matrices:
            storage.resize_(len(waiting))
            on_device.copy_(waiting, non_blocking=True)

    def empty(self) -> None:
        """Takes the memory on the device from the matrices."""
        for matrix in self.matrices:
            matrix.storage.resize_(0)

    @torch.no_grad()
    def keep(self, module: nn.Module) -> None:
        """Copies the matrices of a module inside back to main memory, which were written to on the device."""
        written = {t.untyped_storage()._cdata for t in streamed_tensors(module)}
        for storage, on_device, waiting in self.matrices:
            if storage._cdata in written:
                waiting.copy_(on_device)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Asks to be told when the backward pass of the block begins."""
        if not torch.is_grad_enabled() or in_backward():
            return
        given = {id(t) for t in tree_leaves((args, kwargs))}  # what a block only hands on is of another one
        begins = partial(self.window.before_backward, self, self.number)
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad and id(t) not in given:
                t.register_hook(lambda _: begins())


class Window:
    """The blocks that are on a device now, of all networks that are streamed to it.

    Args:
        device: The device. On a processor copies are made at once.

    Attributes:
        copied: The bytes that were copied to the device.
    """

    def __init__(self, device: torch.device):
        self.device, self.copied = device, 0
        self._calls = 0
        self._present: weakref.WeakSet[StreamedBlock] = weakref.WeakSet()
        self._last: Any = lambda: None  # the block of the call before
        # What followed each block, in forward and in backward passes
        self._next = {1: weakref.WeakKeyDictionary(), -1: weakref.WeakKeyDictionary()}
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream = self._module and self._module.Stream(device=device)

    def before(self, block: StreamedBlock) -> None:
        """Brings a block that is called."""
        if in_backward():  # checkpointing computes it again, within the backward pass of this block or of those around
            self._bring(block)
            return
        self._calls += 1
        self._move_to(block, self._calls, 1)

    def before_backward(self, block: StreamedBlock, number: int) -> None:
        """Brings a block whose backward pass begins; `number` is that of its call."""
        self._move_to(block, number, -1)

    def bring(self, block: StreamedBlock) -> None:
        """Brings a block outside of passes; it stays until another one is brought."""
        self._leave(self._present - {block})
        self._bring(block)

    def _move_to(self, block: StreamedBlock, number: int, direction: int) -> None:
        block.number = number
        following = self._next[direction]
        if (last := self._last()) is not None and last is not block:
            following[last] = weakref.ref(block)
        self._last = weakref.ref(block)
        expected = following.get(block, lambda: None)()
        others = [other for other in self._present if other is not block and other is not expected]
        self._leave(other for other in others if direction > 0 or other.number > number)
        self._bring(block)
        if expected is not None and expected not in self._present:
            expected.number = number + direction
            self._copy(expected)

    def _leave(self, blocks: Iterable[StreamedBlock]) -> None:
        for block in list(blocks):
            self._present.discard(block)
            block.empty()

    def _bring(self, block: StreamedBlock) -> None:
        if block not in self._present:
            self._copy(block)
        if block.arrives is not None:
            self._module.current_stream(self.device).wait_event(block.arrives)
            block.arrives = None

    def _copy(self, block: StreamedBlock) -> None:
        """Starts to copy a block into memory that only blocks before it used, whose work is waited for."""
        self._present.add(block)
        self.copied += block.num_bytes
        if self._module is None:
            block.fill()
            return
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            block.fill()
            block.arrives = self._module.Event()
            block.arrives.record(self._stream)


_BLOCKS: weakref.WeakKeyDictionary[nn.Module, StreamedBlock] = weakref.WeakKeyDictionary()
_WINDOWS: dict[torch.device, Window] = {}


def stream(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Moves the frozen matrices of blocks to main memory, from where each call of a block brings its own.

    Args:
        blocks: Modules, none of them inside of another one, that share no weight with what is outside of them.
        device: Where they compute. The memory is pinned where the machine allows it.
    """
    for module in blocks:
        StreamedBlock(module, window_of(device))


def window_of(device: torch.device) -> Window:
    """The window of a device."""
    if device not in _WINDOWS:
        _WINDOWS[device] = Window(device)
    return _WINDOWS[device]


def bring(module: nn.Module) -> None:
    """Brings the weights of a module, where they are streamed, for what reads them outside of a pass.

    They stay until another block is called or brought.
    """
    if (block := _BLOCKS.get(module)) is not None:
        block.window.bring(block)


def keep(module: nn.Module) -> None:
    """Keeps what was written to the weights of a module, where they are streamed: `bring` it before."""
    if (block := _BLOCKS.get(module)) is not None:
        block.keep(module)


def is_streamed(module: nn.Module) -> bool:
    """Whether a module is a streamed block or inside of one."""
    return module in _BLOCKS


def streamed_tensors(module: nn.Module) -> list[Tensor]:
    """The frozen matrices of a module; of tensors that consist of others, these."""
    frozen = (p for p in module.parameters() if not p.requires_grad and p.dim() > 1)
    return [part for parameter in frozen for part in _parts(parameter) if part.dim() > 1]


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def main_memory(owner: object, num_bytes: int, device: torch.device) -> Tensor:
    """Main memory (num_bytes,) that lives as long as its owner; for a GPU it is pinned where that succeeds.

    (torch's own pinned memory is rounded up to a power of two.)
    """
    found = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and num_bytes:
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(found.data_ptr(), num_bytes, 0)) == 0:
            weakref.finalize(owner, lambda: runtime.cudaHostUnregister(found.data_ptr()))
        else:
            _forget_error(device)
            log.warning("%.1f GB of main memory cannot be pinned: copies from there do not overlap.", num_bytes / 1e9)
    return found


def _forget_error(device: torch.device) -> None:
    """Lets torch report an error that CUDA has kept, which the next kernel would raise otherwise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros((), device=device).add_(1)


def _parts(t: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(t):
        yield t
        return
    for name in t.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
        yield from _parts(getattr(t, name))


def _dense(t: Tensor) -> Tensor:
    """The tensor, in memory of its own."""
    if t.numel() * t.element_size() != t.untyped_storage().nbytes():
        t.data = t.data.clone()
    return t


@torch.no_grad()
def _moved(t: Tensor, waiting: Tensor) -> Matrix:
    """Copies a tensor to main memory, and takes its own memory."""
    flat = t.data.as_strided((t.numel(),), (1,)).view(torch.uint8)  # of a version counter of its own
    waiting = waiting[: len(flat)]
    waiting.copy_(flat)
    storage = t.untyped_storage()
    storage.resize_(0)
    return Matrix(storage, flat, waiting)

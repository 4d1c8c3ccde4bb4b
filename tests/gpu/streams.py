"""Streams, events and memory of the device `card`, as a GPU has them: work of another stream is not done until it is
waited for, and memory that was given back holds something else.

The CPU computes all work of the first stream at once. A copy on another stream leaves its target full of NaN, and is
made when the first stream waits for an event behind it. Memory that is given back is filled with NaN; whoever reads it,
or what has not arrived, gets an `AbsentError`. A copy may take memory that another stream has used: it raises an
`EarlyCopyError` where its stream has not waited for that use.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CAPACITY = int(os.environ.get("CARD_BYTES", 8 * 1024**3))


class AbsentError(RuntimeError):
    """An operation read memory that was given back, or that is still on its way."""


class EarlyCopyError(RuntimeError):
    """A copy may have overwritten what another stream still computes with."""


class Memory:
    """All memory of the device: what is there now, and was there at most, in bytes."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.given_back: set[int] = set()
        self.arriving: set[int] = set()
        self.now = self.peak = self.num_given_back = 0

    def know(self, t: Tensor) -> None:
        """Counts the storage of a tensor."""
        storage = t.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self._change(storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def check(self, func: Any, tensors: list[Tensor]) -> None:
        """Raises AbsentError if an operation reads what is not there."""
        if func.is_view or not (self.given_back or self.arriving):
            return
        for t in tensors:
            if (key := t.untyped_storage()._cdata) in self.given_back or key in self.arriving:
                state = "was given back" if key in self.given_back else "is on its way"
                raise AbsentError(f"{func} reads a tensor {tuple(t.shape)} whose memory {state}")

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Gives memory back, or takes some that holds anything."""
        key = storage._cdata
        assert size in (0, storage.nbytes()), "memory is given back or taken as a whole"
        if (size == 0) == (key in self.given_back):
            return
        as_bytes(storage).fill_(0xFF)  # NaN in every dtype with one
        if size == 0:
            self.given_back.add(key)
            self.num_given_back += 1
            self._change(-storage.nbytes())
        else:
            self.given_back.discard(key)
            self._change(size)

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        size = self.sizes.pop(key)
        if key not in self.given_back:
            self.now -= size
        self.given_back.discard(key)
        self.arriving.discard(key)


memory = Memory()


class GpuStorage:
    """The storage of a tensor of the device: that on the CPU, which only seems to change its size."""

    def __init__(self, held: torch.UntypedStorage):
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)

    def nbytes(self) -> int:
        return 0 if self.held._cdata in memory.given_back else self.held.nbytes()

    def resize_(self, size: int) -> None:
        memory.resize(self.held, size)


class GpuStream:
    """A queue of copies."""

    def __init__(self, device: Any = None):
        self.copies: list[Callable[[], object]] = []
        self.num_done = 0
        self.knows = 0  # how often memory had been given back when it last waited for the first stream

    def wait_stream(self, other: "GpuStream") -> None:
        assert other is FIRST, "only the first stream computes"
        self.knows = memory.num_given_back

    def wait_event(self, event: "GpuEvent") -> None:
        event.stream.do(event.number)

    def do(self, number: int) -> None:
        """Makes all copies up to a number."""
        for copy in self.copies[self.num_done : number]:
            copy()
        self.num_done = max(self.num_done, number)


class GpuEvent:
    """A place in the queue of a stream."""

    def record(self, stream: GpuStream) -> None:
        self.stream, self.number = stream, len(stream.copies)


FIRST = GpuStream()
current = [FIRST]


@contextlib.contextmanager
def stream(chosen: GpuStream) -> Iterator[None]:
    """A context whose work goes to a stream."""
    current.append(chosen)
    try:
        yield
    finally:
        current.pop()


def copy_later(target: Tensor, source: Tensor) -> None:
    """Copies on a stream that is not the first; the target holds NaN until that is waited for."""
    used = current[-1]
    if used.knows < memory.num_given_back:
        raise EarlyCopyError("a copy into memory whose last use its stream has not waited for")
    key = target.untyped_storage()._cdata
    as_bytes(target.untyped_storage()).fill_(0xFF)
    memory.arriving.add(key)
    values = source.clone()

    def arrive() -> None:
        memory.arriving.discard(key)
        target.copy_(values)

    used.copies.append(arrive)


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)

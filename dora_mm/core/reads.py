"""Values of a device that the program branches on. Reading one waits for the device, so that several share a read."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor


class RowMask:
    """Rows of a weight that need another computation, and whether there are any.

    The forward passes of all layers make their masks before the first backward pass asks for one. That one reads the
    answers of all, so that a training step reads once, and not once per layer.

    Attributes:
        rows: The mask (O,).
    """

    def __init__(self, rows: Tensor):
        self.rows, self._any = rows, rows.any()
        self._answer: Callable[[], bool] | None = None
        if rows.device.type != "cpu":
            self._queue = _queue_of(rows.device)
            with _lock:
                _unread.setdefault(self._queue, weakref.WeakSet()).add(self)

    def start_reading(self) -> Callable[[], bool]:
        """Starts to read whether there are any rows, and returns what waits for the answer.

        A GPU that has other work by then goes on meanwhile.
        """
        if self.rows.device.type == "cpu":
            return lambda: bool(self._any)
        with _lock:
            if self._answer is None:
                together = list(_unread.pop(self._queue))
                answers = _read_later(torch.stack([mask._any for mask in together]))
                for index, mask in enumerate(together):
                    mask._answer = _element(answers, index)
            assert self._answer is not None
            return self._answer


_lock = threading.Lock()  # DataParallel makes passes in several threads, and autograd one per device
_unread: dict[Hashable, weakref.WeakSet[RowMask]] = {}


def _queue_of(device: torch.device) -> Hashable:
    """The stream on which a device computes now: what another one computes may not be finished when this one reads."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _element(values: Callable[[], list[bool]], index: int) -> Callable[[], bool]:
    return lambda: values()[index]


def _read_later(flags: Tensor) -> Callable[[], list[bool]]:
    """Starts to read booleans (N,), and returns what waits for them."""
    if not flags.is_cuda:
        return cache(flags.tolist)
    copy, event = flags.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))

    def read() -> list[bool]:
        event.synchronize()
        return copy.tolist()

    return read

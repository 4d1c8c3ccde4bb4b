"""Lets a training step finish before Ctrl-C or a termination signal takes effect."""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DeferredInterrupt:
    """A context manager that defers the first signal to the end of the block; a second one takes effect at once.

    An interruption in the middle of an optimizer step would leave half of the weights updated, and a checkpoint saved
    then would match no step. Outside the main thread, where signals never arrive, it does nothing.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "DeferredInterrupt":
        try:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
                    self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: signals never arrive here
            self._previous.clear()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def check(self) -> None:
        """Delivers the deferred signal, if there is one."""
        if self._pending is not None:
            (number, frame), self._pending = self._pending, None
            self._act(number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending is not None:
            self._act(number, frame)
        self._pending = (number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        else:  # the default action: end the process
            signal.signal(number, previous)
            signal.raise_signal(number)

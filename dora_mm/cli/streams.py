"""Standard output and error, which may be closed or lose their reader: the work goes on without them."""

import io
import os
import stat
import sys
from errno import EIO, EPIPE
from typing import Any, TextIO

IN, OUT, ERROR = 0, 1, 2  # the numbers of the streams


def open_streams() -> None:
    """Lets a command write to its standard streams, whatever becomes of them, until its process ends."""
    for number in (IN, OUT, ERROR):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be the stream of libraries and of started processes
            _drop(number)
    sys.stdout, sys.stderr = _lasting(sys.stdout, OUT), _lasting(sys.stderr, ERROR)


class _LastingStream(io.FileIO):
    """A standard stream that is redirected to the null device once it cannot be written to.

    On standard output the error is raised, once, unless the reader has merely gone: the disk may be full.
    """

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        is_device = stat.S_ISCHR(os.fstat(number).st_mode)
        self._reader_gone = {EPIPE, EIO} if is_device else {EPIPE}  # a terminal that was closed gives EIO

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            _drop(self.fileno())
            if self.fileno() == ERROR or error.errno in self._reader_gone:
                return memoryview(data).nbytes
            raise


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(stream, io.TextIOWrapper) or type(raw) is not io.FileIO or raw.fileno() != number:
        return stream  # a test's or a notebook's own, or already one of these
    stream.flush()
    lasting = _LastingStream(number)
    return io.TextIOWrapper(
        lasting if buffer is raw else io.BufferedWriter(lasting),  # the former with python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _drop(number: int) -> None:
    """Redirects a stream to the null device, also for processes that this one starts."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(nowhere, number)
        os.close(nowhere)

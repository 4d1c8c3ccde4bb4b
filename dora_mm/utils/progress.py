"""How far work is that takes more than a few seconds: a bar in a terminal, elsewhere a line every ten seconds.

The bar is tqdm's, which elsewhere has no lines for a log, and shows nothing while a single item takes long.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
BAR_AFTER, BAR_REFRESH = 2.0, 0.5  # seconds
FIRST_LINE, NEXT_LINE = 5.0, 10.0  # seconds before the first line, and between two
SLOW = 0.05  # seconds for an item, above which that time is said
LONG = 99.5  # seconds, from which on two digits are too few
BYTES = "bytes"  # a unit whose numbers are large

ItemT = TypeVar("ItemT")


class Progress:
    """A context in which work shows how far it is, and what time is left.

    In a terminal that is a bar; elsewhere it is a line in the log, after 5 seconds and then every 10. A thread of its
    own shows them, so that a single long item is no silence. Of work inside of other work the inner one has the lines.

    Nothing is shown where this module does not log at level INFO: beside the main process of a training, and in
    programs that import dora_mm and do not ask for it.

    Args:
        label: What is being done.
        total: The number of items; None where it is not known.
        unit: What items are called, in the plural; "" where the work has none.
        done: The number of items that are done already.
        hidden: Whether to show nothing.
        keep: Whether the end is shown in any case: the bar stays in the terminal, or a last line is logged.

    Attributes:
        done: The number of items that are done; of one in the middle, the share.
        note: What else there is to say, behind the numbers.
    """

    _open: ClassVar[list["Progress"]] = []  # the innermost is last

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: float = 0,
        hidden: bool = False,
        keep: bool = False,
    ):
        self.label, self.total, self.unit, self.done, self.note = label, total, unit, done, ""
        self._first, self._keep, self._reported_at = done, keep, False
        self._shown = not hidden and log.isEnabledFor(logging.INFO)
        self._terminal = sys.stderr is not None and sys.stderr.isatty()  # None where it was closed
        self._ended = threading.Event()

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE
        if self._shown:
            Progress._open.append(self)
            self._thread = threading.Thread(target=self._show_bar if self._terminal else self._show_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if not self._shown:
            return
        self._thread.join()
        Progress._open.remove(self)
        if (self._reported_at or self._keep) and not any(error):
            self.report()

    def advance(self, count: float = 1) -> None:
        """Counts items that are done."""
        self.done += count

    @contextmanager
    def part(self, count: int) -> Iterator[Callable[[float], None]]:
        """A context in which items are worked on together; it takes the share of them that is done, and ends at all."""
        before = self.done

        def reach(share: float) -> None:
            self.done = before + share * count

        yield reach
        reach(1)

    def report(self) -> None:
        """Logs a line now, unless there is a bar; the next one comes ten seconds later."""
        if self._shown and not self._terminal:
            self._reported_at, self._next_line = True, time.monotonic() + NEXT_LINE
            log.info("%s", self.line())

    def line(self) -> str:
        """The state of the work, such as `latents: 12 of 22 images, 40 s left`."""
        return f"{self.label}: {', '.join(filter(None, (self._count(), self.note, self._time())))}"

    def _count(self) -> str:
        if not self.unit:
            return ""
        counts = [self.done] if self.total is None else [self.done, self.total]
        if self.unit == BYTES:
            return " of ".join(f"{count / 1e9:.1f} GB" for count in counts)
        return f"{' of '.join(f'{int(count):,}' for count in counts)} {self.unit}"

    def _time(self) -> str:
        seconds, count = time.monotonic() - self._started, self.done - self._first
        if self._ended.is_set():
            return f"{duration(seconds)} in all"
        if self.total is None or not count:
            return f"{duration(seconds)} so far"
        of_one = seconds / count
        time_of_one = f"{of_one:.2g} s" if of_one < LONG else duration(of_one)
        each = f"{time_of_one} each, " if of_one > SLOW else ""
        return f"{each}{duration(of_one * (self.total - self.done))} left"

    def _show_lines(self) -> None:
        while not self._ended.wait(max(0.1, self._next_line - time.monotonic())):
            if Progress._open[-1] is self and time.monotonic() >= self._next_line:
                self.report()

    def _show_bar(self) -> None:
        if self._ended.wait(BAR_AFTER):
            return
        with self._bar() as bar:
            while True:
                ended = self._ended.wait(BAR_REFRESH)
                bar.n = self.done
                bar.set_postfix_str(self.note)
                if ended:
                    return

    def _bar(self) -> tqdm:
        scaled = self.unit == BYTES
        layout = None
        if not self.unit:
            layout = "{desc} [{elapsed}]"
        elif self.total is not None and not scaled:  # tqdm's own shows shares of an item with all their digits
            layout = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        settings = {"unit": "B" if scaled else f" {self.unit}", "unit_scale": scaled, "leave": self._keep}
        bar = tqdm(total=self.total, desc=self.label, bar_format=layout, dynamic_ncols=True, **settings)
        bar.initial, bar.start_t = self._first, bar.start_t - BAR_AFTER
        return bar


def tracked(items: Iterable[ItemT], label: str, unit: str, total: int | None = None) -> Iterator[ItemT]:
    """Items, with the progress of the work that the caller does with them.

    Args:
        items: The items.
        label: What is done with them.
        unit: What they are called, in the plural.
        total: Their number; None: their length, where they have one.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever has few digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"

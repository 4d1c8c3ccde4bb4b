"""Processes that torchrun has started with one command: they divide pieces of work, and report as one.

A training computes in them together (`dora_mm.train.processes`). These need no more than a word of each other, so they
form no process group: they meet in the store of keys that torchrun keeps. So one that waits can be interrupted, and
another number of them can go on. accelerate needs that group, and divides work beforehand: here a process that is
faster does more of it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import count as numbers
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dora_mm.utils.messages import OURS

if TYPE_CHECKING:
    from dora_mm.utils.run_directory import RunDirectory

REPORTER = "reporter"  # the key of the process that says what has ended the command
PAUSE = 0.05  # seconds between two looks into the store
LONGEST_SEARCH = timedelta(seconds=60)  # for the store

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")
log = logging.getLogger(__name__)


class OtherProcessError(ValueError):
    """Another of the processes has stopped, and says why."""


class Processes:
    """The processes that were started together, all of which make the same calls; the usual case is a single one.

    Args:
        store: A store of torch.distributed; a single process needs none.
        index: The number of this process; the main one is 0.
        count: The number of all.
    """

    def __init__(self, store: Any = None, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._store, self._calls = store, numbers()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes what is written once, and informs."""
        return self.index == 0

    def next_call(self) -> str:
        """The same name in all processes, and another one in each call."""
        return f"call {next(self._calls)}"

    def from_main(self, value: ValueT) -> ValueT:
        """The value of the main process, which JSON can hold, in all of them.

        Raises:
            OtherProcessError: The main process, or another one, has stopped.
        """
        key = self.next_call()
        if self.count == 1:
            return value
        if self.is_main:
            self.put(key, value)
            return value
        return self.wait_for(key)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main process run a block before the others, which then find the files that it has written.

        Raises:
            OtherProcessError: The main process, or another one, has stopped.
        """
        key = self.next_call()
        if not self.is_main:
            self.wait_for(key)
        yield
        if self.is_main and self.count > 1:
            self.put(key, None)

    @contextmanager
    def run(self, opened: AbstractContextManager[RunDirectory]) -> Iterator[RunDirectory]:
        """The run directory that the main process opens, in all of them.

        Args:
            opened: The context that opens it, which only the main process enters.
        """
        from dora_mm.utils.run_directory import RunDirectory  # here, since it reads YAML

        with opened if self.is_main else nullcontext() as run:
            path = self.from_main(str(run.path) if run else "")
            yield run or RunDirectory(Path(path))

    def put(self, key: str, value: Any) -> None:
        """Puts a value, which JSON can hold, into the store."""
        with _reaching():
            self._store.set(key, json.dumps(value))

    def has(self, key: str) -> bool:
        """Whether a value is in the store.

        Raises:
            OtherProcessError: A process has stopped.
        """
        with _reaching():
            if self._store.check([REPORTER]):
                raise OtherProcessError(f"another of the {self.count} processes has stopped")
            return self._store.check([key])

    def wait_for(self, key: str) -> Any:
        """The value that another process puts into the store.

        Raises:
            OtherProcessError: A process has stopped.
        """
        while not self.has(key):
            time.sleep(PAUSE)  # here, and not in the store: a signal ends it
        with _reaching():
            return json.loads(self._store.get(key))

    def take(self, key: str) -> int:
        """A number that no other process gets under this key: 0, 1 and so on.

        Raises:
            OtherProcessError: A process has stopped.
        """
        self.has(key)
        with _reaching():
            return self._store.add(key, 1) - 1

    def reports(self) -> bool:
        """Whether this process reports what ended the command: the first that calls this does, for all of them."""
        if self.count == 1:
            return True
        try:
            with _reaching():
                return self._store.compare_set(REPORTER, "", str(self.index)) == str(self.index).encode()
        except OtherProcessError:
            return self.is_main


SINGLE_PROCESS = Processes()


class DividedWork:
    """Pieces of work with numbers, each of which one process does, whichever is free: some are faster than others.

    Args:
        processes: The processes.
        total: The number of pieces, the same in all of them.
    """

    def __init__(self, processes: Processes, total: int):
        self.processes, self.total = processes, total
        self._name = processes.next_call()
        self._others: list[int] = []  # the pieces of others of which the main process has not heard yet

    def __iter__(self) -> Iterator[int]:
        """The pieces that this process does, in order; each is taken when the one before is done."""
        if self.processes.count == 1:
            yield from range(self.total)
            return
        last, number = -1, 0
        while number < self.total:
            number = self.processes.take(self._name)
            self._others += range(last + 1, min(number, self.total))
            if number < self.total:
                yield number
            last = number

    def report(self, number: int, result: Any) -> None:
        """Tells the main process what has come of a piece, which JSON can hold."""
        if not self.processes.is_main:
            self.processes.put(f"{self._name}/{number}", result)

    def reported(self, *, wait: bool = False) -> Iterator[Any]:
        """In the main process, what has come of pieces of others since the last call.

        Args:
            wait: Whether to wait for all that is not done yet.

        Raises:
            OtherProcessError: A process has stopped.
        """
        for number in list(self._others) if self.processes.is_main else ():
            key = f"{self._name}/{number}"
            if wait or self.processes.has(key):
                result = self.processes.wait_for(key)
                self._others.remove(number)
                yield result


def divided(processes: Processes, function: Callable[[ItemT], ValueT], items: Sequence[ItemT]) -> Iterator[ValueT]:
    """The results of a function for items, in their order, in every process; each computes what is free.

    The main process says what the others warn of meanwhile.

    Args:
        processes: The processes.
        function: Computes a result that is the same after JSON has held it.
        items: The same in all processes.

    Raises:
        OtherProcessError: A process has stopped.
    """
    if processes.count == 1:
        yield from map(function, items)
        return
    share, name, next_one = DividedWork(processes, len(items)), processes.next_call(), 0
    for number in share:
        with nullcontext([]) if processes.is_main else _kept_warnings() as warnings:
            result = function(items[number])
        processes.put(f"{name}/{number}", [result, warnings])
        while next_one < len(items) and processes.has(f"{name}/{next_one}"):
            yield _reported(processes.wait_for(f"{name}/{next_one}"))
            next_one += 1
    for number in range(next_one, len(items)):
        yield _reported(processes.wait_for(f"{name}/{number}"))


def _reported(found: tuple[ValueT, list[str]]) -> ValueT:
    """A result, after logging the warnings of its process."""
    result, warnings = found
    for text in warnings:
        log.warning("%s", text)
    return result


@contextmanager
def _kept_warnings() -> Iterator[list[str]]:
    """The warnings of a process that says none, as long as the context is open."""
    texts: list[str] = []
    keeper = logging.Handler(logging.WARNING)
    keeper.emit = lambda record: texts.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in OURS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(keeper)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield texts
    finally:
        for logger, (level, propagates) in zip(loggers, before, strict=True):
            logger.removeHandler(keeper)
            logger.setLevel(level)
            logger.propagate = propagates


def num_started() -> int:
    """How many processes were started together, by what torchrun and `accelerate launch` say."""
    return int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def started_together() -> Processes:
    """The processes that were started together. From then on, only the main one informs and warns.

    Raises:
        ValueError: They cannot reach each other; or this process takes the place of one that has died, whose work the
            others would wait for without end. They stop as well then.
    """
    if num_started() == 1:
        return SINGLE_PROCESS
    from torch.distributed import PrefixStore, rendezvous

    try:
        with _reaching():
            store, index, count = next(rendezvous("env://", timeout=LONGEST_SEARCH))
    except ValueError as error:
        raise ValueError(f"{num_started()} processes were started, and cannot meet: {error}") from error
    if index:
        for name in OURS:
            logging.getLogger(name).setLevel(logging.ERROR)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"dora_mm {attempt}", store)
    processes = Processes(store, index, count)
    with _reaching():
        is_second = store.add(f"started {index}", 1) > 1  # its machine has started again, the one of the store has not
    if is_second:
        processes.reports()
        raise ValueError(f"process {index} was started a second time: all of the {count} have to be started together")
    return processes


def reports_end() -> bool:
    """Whether this process says what has ended the command; see `Processes.reports`."""
    try:
        return started_together().reports()
    except ValueError:  # there is nobody to agree with
        return True


@contextmanager
def _reaching() -> Iterator[None]:
    """Errors of the store as ValueError: what keeps it has ended, and with it the other processes."""
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise OtherProcessError("torchrun, or the process that MASTER_ADDR names, does not answer") from error

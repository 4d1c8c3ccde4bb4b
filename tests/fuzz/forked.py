"""Cases in forked children with limits of memory and time: what becomes of each, whatever that does to its process.

The parent has imported everything, has computed nothing and has one thread: after a product of two threads a child
would wait for the second for ever.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dora_mm.cli.errors import causes, user_message
from dora_mm.utils.messages import UNSEEN

BATCH = 200
SECONDS = 10  # of the processor for a case
CLOCK_SECONDS = 60  # for one that waits, also on a machine that does other things as well
BYTES = 3 * 2**29  # of memory beyond that of the parent
FILE_BYTES = 2**28
LONGEST_LINE, MOST_CHARACTERS = 2100, 12_000  # of a message: a screen, with lines of names out of files
READ_ONLY = ("/dev/null", "/dev/urandom", "/proc", "/sys", "/etc", "/usr/share/zoneinfo")
FINE = ("read", "refused")  # how a case may end


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        kind: "read", "refused" with one sentence, or what must not be: "traceback", "message", "memory", "signal",
            "outside", "left".
        text: The message, or what happened.
    """

    kind: str
    text: str = ""


def outcomes(cases: Sequence[Callable[[], object]], allowed: Sequence[Path]) -> Iterator[Outcome]:
    """What becomes of each case.

    Args:
        cases: Functions that read something.
        allowed: The folders that they may write to; what they read is there, too, or belongs to installed packages.
    """
    done = 0
    while done < len(cases):
        status, found = _in_child(cases[done : done + BATCH], allowed)
        yield from found
        done += len(found)
        if status and done < len(cases):  # it ended within the case behind those
            ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {status >> 8}"
            yield Outcome("signal", ended)
            done += 1


def _in_child(cases: Sequence[Callable[[], object]], allowed: Sequence[Path]) -> tuple[int, list[Outcome]]:
    assert len(os.listdir("/proc/self/task")) == 1, "a second thread would be missing in the child"
    here, there = os.pipe()
    if not (child := os.fork()):
        try:
            os.close(here)
            _limit()
            seen = _watch(allowed)
            with open(there, "w", buffering=1, encoding="utf-8") as pipe:
                for case in cases:
                    signal.setitimer(signal.ITIMER_PROF, SECONDS)
                    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
                    outcome = _outcome(case)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if seen:
                        outcome = Outcome("outside", seen[0])
                        seen.clear()
                    pipe.write(json.dumps(outcome) + "\n")
            os._exit(0)
        finally:
            os._exit(3)
    os.close(there)
    with open(here, encoding="utf-8") as pipe:
        found = [Outcome(*json.loads(line)) for line in pipe if line.endswith("\n")]
    return os.waitpid(child, 0)[1], found


def _outcome(case: Callable[[], object]) -> Outcome:
    try:
        case()
    except Exception as error:
        message = user_message(error)
        if any(isinstance(cause, MemoryError) for cause in causes(error)):
            return Outcome("memory", f"{message or error!r}")
        if message is None:
            *_, last = traceback.extract_tb(error.__traceback__)
            return Outcome("traceback", f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})")
        lines = message.split("\n")
        if len(message) > MOST_CHARACTERS or max(map(len, lines)) > LONGEST_LINE or any(map(UNSEEN.search, lines)):
            return Outcome("message", f"{len(message)} characters: {message[:200]!r}")
        return Outcome("refused", message)
    return Outcome("read")


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def _watch(allowed: Sequence[Path]) -> list[str]:
    """What is opened outside the folders, and sockets and processes, as far as Python's own events tell.

    HDF5, safetensors and av open files behind them.
    """
    seen: list[str] = []
    installed = {sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
    writable = tuple(str(folder.resolve()) for folder in allowed)
    readable = (*writable, *READ_ONLY, *installed, *(os.path.realpath(folder) for folder in installed))

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(
            ("socket.", "subprocess.", "os.exec", "os.fork", "os.system", "os.posix_spawn", "ctypes.dl")
        ):
            seen.append(event)
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, writes = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not path.startswith(writable if writes else readable):
                seen.append(f"{'writes' if writes else 'opens'} {path}")

    sys.addaudithook(hook)
    return seen

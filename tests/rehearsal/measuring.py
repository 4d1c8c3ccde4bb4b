"""What a command takes: time, memory at its peak, and bytes written, of a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

EVERY = 0.1  # seconds between two looks at the memory
OPTIONS = {  # blocks of 1 MB and more go back to the system when they are freed: so the memory is that of tensors
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Peak:
    """The most that was there, in MB, each at its own time.

    Attributes:
        anonymous: Memory that the process has written, beyond the libraries, as the next.
        mapped: Files that are mapped, such as weights that are read as they lie on disk.
        gpu: Memory of the GPU beyond what was taken before the command.
    """

    anonymous: float = 0.0
    mapped: float = 0.0
    gpu: float = 0.0

    def raise_to(self, anonymous: float, mapped: float, gpu: float) -> None:
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
        self.gpu = max(self.gpu, gpu)


@dataclass
class Measured:
    """A command that has run.

    Attributes:
        command: As a person types it.
        code: Its exit code; below zero the signal that has ended it.
        seconds: By the clock.
        processor_seconds: Of all threads, in the program and in the system.
        written: MB that it has written to the disk.
        peaks: By phase, in order.
        output: What it has printed, errors included.
    """

    command: str
    code: int
    seconds: float
    processor_seconds: float
    written: float
    peaks: dict[str, Peak] = field(default_factory=dict)
    output: str = ""

    @property
    def peak(self) -> Peak:
        """That of all phases."""
        values = [asdict(peak) for peak in self.peaks.values()]
        return Peak(**{name: max(value[name] for value in values) for name in values[0]})


def measured(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    *,
    phase: Callable[[], str] = lambda: "",
    should_stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Runs `dora-mm` and looks at its memory until it ends.

    Args:
        arguments: Those of the command.
        folder: Where it runs.
        log: The file that gets its output.
        phase: Names what it is doing now.
        should_stop: When to end it by SIGKILL.
    """
    libraries, before, started = memory_of_libraries(), gpu_memory(), time.monotonic()
    peaks: dict[str, Peak] = {}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_mm", *arguments],
            cwd=folder,
            env=os.environ | OPTIONS,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for anonymous, mapped in memory_until_end(process):
            sizes = max(0.0, anonymous - libraries[0]), max(0.0, mapped - libraries[1]), gpu_memory() - before
            peaks.setdefault(phase(), Peak()).raise_to(*sizes)
            if should_stop():
                process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(
        command=f"dora-mm {' '.join(arguments)}",
        code=process.returncode,
        seconds=time.monotonic() - started,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        written=usage.ru_oublock * 512 / 1e6,
        peaks=peaks,
        output=log.read_text(errors="replace"),
    )


def memory_until_end(process: subprocess.Popen[bytes]) -> Iterator[tuple[float, float]]:
    """The anonymous and the mapped memory of a process in MB, again and again until it has ended; it is not reaped."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        found = status_of(process.pid)
        if "RssAnon" in found:  # a process that is ending has no memory
            yield found["RssAnon"], found["RssFile"]
        time.sleep(EVERY)


def status_of(pid: int) -> Mapping[str, float]:
    """What the system says of the memory of a process, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 / 1e6 for name, size, _ in sizes}


@cache
def memory_of_libraries() -> tuple[float, float]:
    """What a process that has imported what all commands need has before anything is loaded, in MB."""
    code = (
        "import dora_mm.models.images.families, diffusers, transformers, peft; print(open('/proc/self/status').read())"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    kilobytes = {line.split(":")[0]: line.split()[1] for line in output.splitlines() if line.startswith("Rss")}
    return int(kilobytes["RssAnon"]) * 1024 / 1e6, int(kilobytes["RssFile"]) * 1024 / 1e6


def gpu_memory() -> float:
    """What is taken of the GPU by all processes, in MB; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6

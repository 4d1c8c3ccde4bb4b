"""The time and memory that a run took."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

STATUS = Path("/proc/self/status")


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float:
    """The median seconds per optimizer step, from the rows of a metrics.jsonl file.

    The median is over the intervals between consecutive rows, so that slow first steps, occasional validations, and a
    pause before the run was resumed do not count.
    """
    times = [(row["step"], row["seconds"]) for row in rows]
    spans = [(after - before) / (last - first) for (first, before), (last, after) in pairwise(times) if after > before]
    return median(spans) if spans else times[-1][1] / times[-1][0]


def peak_memory_mb() -> float:
    """The peak memory of this process so far, in MiB: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():  # on Linux, ru_maxrss starts at the resident size of the parent process
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

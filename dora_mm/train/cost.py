"""What a run took: time and memory."""

import resource
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float:
    """From the rows of a metrics.jsonl: the median over what lies between two of them, so that the slow first steps,
    validations now and then, and a pause before the run was resumed do not count."""
    times = [(row["step"], row["seconds"]) for row in rows]
    spans = [(after - before) / (last - first) for (first, before), (last, after) in pairwise(times) if after > before]
    return median(spans) if spans else times[-1][1] / times[-1][0]


def peak_memory_mb() -> float:
    """The most that this process has held so far, in 2^20 bytes: on a GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():  # Linux' ru_maxrss starts at what the process that started this one held
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

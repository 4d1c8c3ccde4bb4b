"""What an operation costs on this machine: seconds, measured in turns, and bytes."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def in_turns(
    runs: dict[str, Callable[[], float]], repeats: int, after_round: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds by name, `repeats` each, after one uncounted round. What disturbs the machine for a while meets all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                found[name].append(seconds)
        after_round()
    return found


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def saved_bytes(forward: Callable[[], torch.Tensor], module: nn.Module, x: torch.Tensor) -> int:
    """What the graph holds beside the parameters, the input and the output."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    known.add(y.untyped_storage().data_ptr())
    return sum(size for pointer, size in held.items() if pointer not in known)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most memory that is allocated at one time during `action`, above what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes of start and stop would break the progress bar
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        action()
    recorded: Any = profile.profiler
    events = recorded.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

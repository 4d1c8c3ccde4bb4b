"""The time and memory of an operation on this machine, in seconds and bytes."""

import os
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

LEAST_ROUNDS = 3  # for quartiles
REPLAY_SECONDS = 0.01  # about how long the replay of a CUDA graph takes, so that its own launch does not count


def alternate(
    runs: dict[str, Callable[[], float]],
    repeats: int,
    after_round: Callable[[], object],
    is_late: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Times several runs in alternation, so that a disturbance of the machine affects all of them.

    Args:
        runs: Name to a function that runs once and returns its seconds.
        repeats: The number of rounds that count, after one round of warm-up.
        after_round: Called after every round, the warm-up included.
        is_late: Whether to stop; asked after every round once three count.

    Returns:
        Name to `repeats` times in seconds, or fewer where it was late.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if round_number:
                times[name].append(seconds)
        after_round()
        if round_number >= LEAST_ROUNDS and is_late():
            break
    return times


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that `action` takes, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def captured(action: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], float]:
    """Captures `action` in a CUDA graph, so that the time of launching its kernels does not count.

    Args:
        action: What to run; it must not read results back.
        device: A GPU.
        pool: The memory of graphs that take turns, from `torch.cuda.graph_pool_handle`; None gives it its own.

    Returns:
        A function that replays the graph, and returns the seconds of one run of `action`.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what happens on first runs only must not be captured
        for _ in range(3):
            action()
        count = max(3, min(100, int(REPLAY_SECONDS / seconds_of(action, device))))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(count):
            action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return replay


def synchronize(device: torch.device) -> None:
    """Waits for the work of a GPU; does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: list[float]) -> tuple[float, float, float]:
    """Returns the median, the lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def saved_bytes(forward: Callable[[], torch.Tensor], module: nn.Module, x: torch.Tensor) -> int:
    """Returns the bytes that the graph saves for the backward pass, without parameters, input and output.

    Args:
        forward: Computes the output.
        module: Its parameters do not count.
        x: The input, which does not count.
    """
    excluded = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()  # parts of the graph that are freed in the pass leave it

    def record(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved.tensor):
        y = forward()
    excluded.add(y.untyped_storage().data_ptr())
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in kept)}
    return sum(size for pointer, size in storages.items() if pointer not in excluded)


class _Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Returns the peak of the allocated memory during `action`, in bytes above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop messages would break the progress bar
    activities = [torch.profiler.ProfilerActivity.CPU]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that events do not last until a next cycle; keeping them is slow
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with profile:
            action()
    recorded: Any = profile.profiler
    events = recorded.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

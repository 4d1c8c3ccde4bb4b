"""One adapted layer of an SDXL UNet or of an 8B LLM against its peers, eager and compiled: an entry of `make gpu`.

"forward" and "step" (forward and backward) are launched ten times in a row, as fast as Python can; "on the GPU" are the
same in a CUDA graph, which leaves only the time of the kernels. Layers as small as SDXL's differ a lot between the two.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from tests.benchmarks.contenders import (
    CONTENDERS,
    DENSE,
    Case,
    Contenders,
    can_compile,
    change,
    compiled,
    fixed_bases,
    trained,
)
from tests.benchmarks.gpu_run import Row, Run, compared, many_compiled, name_of, report
from tests.benchmarks.timing import alternate, captured, peak_bytes, seconds_of

# Name, out, in, tokens, rank. A 1024 px image has 4096 tokens at width 640 and 1024 at width 1280; four have four times
# as many, and 308 words. What says most comes first: the rest is cut when time is short.
BF16 = (
    Case("SDXL 1280, 1024 tokens", 1280, 1280, 1024, 16),
    Case("8B LLM, q", 4096, 4096, 2048, 16),
    Case("SDXL 640, 4096 tokens", 640, 640, 4096, 16),
    Case("8B LLM, up", 14336, 4096, 2048, 16),
    Case("SDXL 1280, 4096 tokens", 1280, 1280, 4096, 16),
    Case("SDXL cross-attention", 1280, 2048, 308, 16),
    Case("8B LLM, down", 4096, 14336, 2048, 16),
    Case("8B LLM, q", 4096, 4096, 2048, 128),
    Case("8B LLM, k", 1024, 4096, 2048, 16),
)
FP32 = (BF16[0], BF16[4])
TINY = (Case("tiny", 48, 32, 24, 4),)
WARM_UP = 3  # a compiled layer that keeps something of the base is compiled again in the second step
CALLS = 10  # from one wait for the GPU to the next


def run(run: Run) -> None:
    """Measures all cases and writes layers.csv."""
    eager = CONTENDERS | DENSE
    more = {f"{name}, compiled": compiled(build, run.compiler) for name, build in run.to_compile(eager).items()}
    contenders = eager | more
    if not run.dry and not can_compile(run.device):
        run.leave_out("compiled layers: torch.compile does not work here")
        contenders = eager
    cases = [(case, torch.bfloat16) for case in (TINY if run.dry else BF16)]
    cases += [] if run.dry else [(case, torch.float32) for case in FP32]
    rows: list[Row] = []
    for case, dtype in cases:
        if not run.is_cut(f"{case.name}, rank {case.rank}, {name_of(dtype)}"):
            with many_compiled():
                rows += bench_case(run, case, dtype, contenders)
            run.save("layers.csv", rows)


def bench_case(run: Run, case: Case, dtype: torch.dtype, contenders: Contenders) -> list[Row]:
    """Returns the rows of one layer: every measure of every contender that runs here."""
    torch.manual_seed(0)
    torch.compiler.reset()
    base = nn.Linear(case.num_in, case.num_out, device=run.device, dtype=dtype).requires_grad_(False)
    x = torch.randn(case.num_tokens, case.num_in, device=run.device, dtype=dtype, requires_grad=True)
    dY = torch.randn(case.num_tokens, case.num_out, device=run.device, dtype=dtype)
    layers: dict[str, nn.Module] = {}
    with contextlib.ExitStack() as stack:
        for name, build in contenders.items():
            if name.endswith("compiled") and run.is_cut(f"{name}, {case.name}"):
                continue
            with run.trying(name, case.name):
                layer = build(base, case.rank).to(run.device)
                stack.enter_context(fixed_bases([layer]))
                for _ in range(run.rounds(WARM_UP)):
                    step(layer, x, dY)
                layers[name] = layer
        times = {
            measure: alternate(runs, run.rounds(15), int, run.is_late)
            for measure, runs in measures(run, case, layers, x, dY).items()
        }
        times["peak"] = {name: [peak_bytes(partial(step, layer, x, dY), run.device)] for name, layer in layers.items()}
    rows = [row for measure, found in times.items() for row in compared(found, case.name, case.rank, measure, dtype)]
    report(rows)
    return rows


def step(layer: nn.Module, x: torch.Tensor, dY: torch.Tensor) -> None:
    torch.autograd.grad(layer(x), [x, *trained(layer)], dY)


def measures(
    run: Run, case: Case, layers: dict[str, nn.Module], x: torch.Tensor, dY: torch.Tensor
) -> dict[str, dict[str, Callable[[], float]]]:
    """The runs to time, by measure and contender."""
    actions: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(layer, x) for name, layer in layers.items()},
        "step": {name: partial(step, layer, x, dY) for name, layer in layers.items()},
    }
    runs: dict[str, dict[str, Callable[[], float]]] = {
        measure: {
            name: partial(changed, layers[name], partial(in_a_row, action, run.device)) for name, action in of.items()
        }
        for measure, of in actions.items()
    }
    if run.device.type != "cuda":
        return runs
    for measure, of in actions.items():
        found = runs[f"{measure} on the GPU"] = {}
        for name, action in of.items():
            with run.trying(name, f"{case.name}, in a CUDA graph"):
                found[name] = partial(changed, layers[name], captured(action, run.device))
    return runs


def changed(layer: nn.Module, measure: Callable[[], float]) -> float:
    """Measures after a change of the parameters, as in training."""
    change(trained(layer))
    return measure()


def in_a_row(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of several runs, of which none waits for the one before."""

    def repeat() -> None:
        for _ in range(CALLS):
            action()

    return seconds_of(repeat, device) / CALLS

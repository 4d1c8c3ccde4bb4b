"""One adapted layer of an SDXL UNet or of an 8B LLM against its peers: an entry of `make gpu`.

"forward" and "step" (forward and backward) are launched ten times in a row, as fast as Python can; "on the GPU" are the
same in a CUDA graph, which leaves only the time of the kernels. Layers as small as SDXL's differ a lot between the two.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.benchmarks.contenders import CONTENDERS, DENSE, Case, change, fixed_bases, trained
from tests.benchmarks.gpu.run import Row, Run, compared, name_of, report
from tests.benchmarks.timing import alternate, captured, peak_bytes, seconds_of

# Name, out, in, tokens, rank. A 1024 px image has 4096 tokens at width 640 and 1024 at width 1280; four have four times
# as many, and 308 words. What says most comes first: the rest is cut when time is short.
CASES = (
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
IN_FLOAT32 = (CASES[0], CASES[4])
TINY = (Case("tiny", 48, 32, 24, 4),)
WARM_UP = 3  # a compiled module that keeps something of the base is compiled again in the second step
CALLS = 10  # from one wait for the GPU to the next
STEP, FORWARD, PEAK, GRAPH = "step", "forward", "peak", " on the GPU"
MEASURES = (STEP, STEP + GRAPH, FORWARD, FORWARD + GRAPH, PEAK)


def run(run: Run) -> None:
    """Measures all cases."""
    cases = [(case, run.dtype) for case in (TINY if run.dry else CASES)]
    cases += [] if run.dry else [(case, torch.float32) for case in IN_FLOAT32]
    contenders = run.contenders(*CONTENDERS, *DENSE)
    for case, dtype in cases:
        if run.is_cut(f"{case.name}, rank {case.rank}, {name_of(dtype)}"):
            continue
        torch.manual_seed(0)
        base = nn.Linear(case.num_in, case.num_out, device=run.device, dtype=dtype).requires_grad_(False)
        builds = {name: partial(build, base, case.rank) for name, build in contenders.items()}
        bench(run, case.name, case.rank, builds, *batch(run, case.num_tokens, case.num_in, case.num_out, dtype))


def batch(run: Run, num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and dY."""
    x = torch.randn(num_tokens, num_in, device=run.device, dtype=dtype, requires_grad=True)
    return x, torch.randn(num_tokens, num_out, device=run.device, dtype=dtype)


def bench(
    run: Run,
    name: str,
    rank: int,
    builds: dict[str, Callable[[], nn.Module]],
    x: Tensor,
    dY: Tensor,
    measures: tuple[str, ...] = MEASURES,
) -> None:
    """Measures modules that take turns, and saves the rows of each measure as soon as they exist.

    Args:
        run: The entry.
        name: The case.
        rank: The rank of the adapters.
        builds: The name of a contender to a function that returns its module. One that raises is left out.
        x: The input.
        dY: The gradient of the output.
        measures: Some of `MEASURES`.
    """
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        modules: dict[str, nn.Module] = {}
        for contender, build in builds.items():
            with run.trying(contender, name):
                module = build().to(run.device)
                stack.enter_context(fixed_bases([module]))
                for _ in range(run.rounds(WARM_UP)):
                    step(module, x, dY)
                modules[contender] = module
        for measure in measures if modules else ():
            if run.device.type == "cpu" and measure.endswith(GRAPH):
                continue
            if rows and run.is_cut(f"{name}, {measure}"):  # what has been built is measured once
                break
            found = compared(measured(run, name, measure, modules, x, dY), name, rank, measure, x.dtype)
            run.save(found)
            rows += found
    report(rows)


def measured(
    run: Run, name: str, measure: str, modules: dict[str, nn.Module], x: Tensor, dY: Tensor
) -> dict[str, list[float]]:
    """One measure of every module that can be measured so, as `alternate` returns it."""
    if measure == PEAK:
        return {key: [peak_bytes(partial(step, module, x, dY), run.device)] for key, module in modules.items()}
    pool = torch.cuda.graph_pool_handle() if measure.endswith(GRAPH) else None
    runs: dict[str, Callable[[], float]] = {}
    for key, module in modules.items():
        action = partial(step, module, x, dY) if measure.startswith(STEP) else partial(module, x)
        with run.trying(key, f"{name}, {measure}"):
            timed = (
                captured(action, run.device, pool) if pool else partial(in_a_row, action, run.device, run.rounds(CALLS))
            )
            runs[key] = partial(changed, module, timed)
    return alternate(runs, run.rounds(9), int, run.is_late)


def step(module: nn.Module, x: Tensor, dY: Tensor) -> None:
    torch.autograd.grad(module(x), [x, *trained(module)], dY)


def changed(module: nn.Module, measure: Callable[[], float]) -> float:
    """Measures after a change of the parameters, as in training."""
    change(trained(module))
    return measure()


def in_a_row(action: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of one of several runs, of which none waits for the one before."""

    def repeat() -> None:
        for _ in range(count):
            action()

    return seconds_of(repeat, device) / count

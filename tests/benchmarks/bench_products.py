"""For the table in dora_mm/kernels/gpus.py: our single kernel against the vendor's product and a pass.

An entry of `make gpu`. For each shape and direction it measures, alternating: only the vendor's product, rounded (the
limit), our single kernel (low_rank_matmul), and the vendor's product in fp32 followed by low_rank_add. They are
captured in CUDA graphs, so that launching them is not measured. Saves products.csv (microseconds, medians and
quartiles) and prints it, with the rate of our kernel as a fraction of the vendor's, which should be 0.85 or more at
4096 x 1280 x 1280, and the thresholds that the times suggest.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dora_mm.kernels.gpus import gpu
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear
from dora_mm.kernels.output_grad import output_grad
from dora_mm.utils.tables import aligned_columns
from tests.benchmarks.gpu.run import Row, Run, name_of
from tests.benchmarks.timing import alternate, captured, seconds_of, summary

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (  # tokens, in, out
    (4096, 640, 640),
    (4096, 1280, 1280),
    (1024, 1280, 1280),
    (308, 2048, 1280),
    (4096, 1280, 10240),
    (4096, 5120, 1280),
    (2048, 4096, 4096),
    (2048, 4096, 14336),
    (2048, 14336, 4096),
)
TINY: tuple[Shape, ...] = ((16, 32, 48), (16, 48, 32))
RANK = 16
LIMIT, OURS, VENDOR = "vendor alone", "one kernel", "vendor and a pass"


def run(run: Run) -> None:
    """Measures all shapes in half precision, and prints what they suggest for cards.py. (fp32 is the vendor's.)"""
    rows: list[Row] = []
    for shape in (TINY if run.dry else SHAPES) if run.backend == "triton" else ():
        if not run.is_cut(" x ".join(map(str, shape))):
            found = measure(run, shape, run.dtype)
            run.save(found)
            rows += found
    if rows:
        heading = [key for key in rows[0] if not key.endswith(("low", "high"))]
        print(aligned_columns([heading, *([str(row[key]) for key in heading] for row in rows)], 1))
        print("\n".join(suggestions(rows, torch.empty(0, device=run.device))), flush=True)


def measure(run: Run, shape: Shape, dtype: torch.dtype) -> list[Row]:
    """Times the products of one shape.

    Returns:
        A row per direction: medians and quartiles in microseconds, and the rate of our kernel as a fraction of the
        vendor's.
    """
    timed = captured if run.device.type == "cuda" else lambda product, device: partial(seconds_of, product, device)
    rows = []
    for direction, products in candidates(shape, dtype, run.device).items():
        runs = {name: timed(product, run.device) for name, product in products.items()}
        times = alternate(runs, run.rounds(9), int, run.is_late)
        row: Row = {"dtype": name_of(dtype), **dict(zip(("tokens", "in", "out"), shape, strict=True))}
        row |= {"direction": direction, "repeats": len(times[OURS])}
        found = {name: summary(seconds) for name, seconds in times.items()}
        for name, values in found.items():
            keys = (name, f"{name}, low", f"{name}, high")
            row |= {key: f"{1e6 * value:.1f}" for key, value in zip(keys, values, strict=True)}
        rows.append(row | {"share": f"{found[LIMIT][0] / found[OURS][0]:.2f}"})
    return rows


def candidates(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """The products to compare, as functions by direction and name."""
    tokens, inner, out = shape
    torch.manual_seed(0)
    x, dY, W0 = (
        torch.randn(*size, device=device, dtype=dtype) for size in ((tokens, inner), (tokens, out), (out, inner))
    )
    A, B, gain = (torch.randn(*size, device=device) for size in ((RANK, inner), (out, RANK), (out,)))
    h, u = x @ A.to(dtype).T, dY @ B.to(dtype)

    def forward(vendor: bool) -> Tensor:
        return low_rank_linear(x, W0, None, gain, h, B, 1.0, False, vendor)

    def backward_in_two() -> Tensor:  # g dY is written by a pass that the sums for dm need in any case
        scaled, *_ = output_grad(dY, None, x, W0, None, None, None, None, None, gain, 1.0, True, False)
        return low_rank_grad_input(scaled, W0, None, u, A, True)

    return {
        "forward": {LIMIT: lambda: x @ W0.T, OURS: lambda: forward(False), VENDOR: lambda: forward(True)},
        "backward": {
            LIMIT: lambda: dY @ W0,
            OURS: lambda: low_rank_grad_input(dY, W0, gain, u, A, False),
            VENDOR: backward_in_two,
        },
    }


def suggestions(rows: list[Row], device: Tensor) -> list[str]:
    """What cards.py says for the card of a tensor, and what the rows suggest, a line per threshold."""
    lines = []
    for name, direction, inner in (("vendor_from", "forward", "in"), ("vendor_from_back", "backward", "out")):
        own = [row for row in rows if row["direction"] == direction]
        now = getattr(gpu(device), name)
        lines.append(f"{name} is {now}; the {len(own)} shapes suggest {threshold(own, inner):g}")
    return lines


def threshold(rows: list[Row], inner: str) -> float:
    """The inner size from which the vendor's product and a pass should be used.

    Args:
        rows: Of one direction and dtype.
        inner: The column of the size over which the product sums.

    Returns:
        0 for always, inf for never, or a measured size: where the chosen times have the least geometric mean.
    """

    def cost(least: float) -> float:
        return sum(math.log(float(row[VENDOR if row[inner] >= least else OURS])) for row in rows)

    sizes = sorted({row[inner] for row in rows})
    return min([0.0, *sizes[1:], math.inf], key=cost)

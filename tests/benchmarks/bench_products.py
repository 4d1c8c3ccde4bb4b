"""What the table in dora_mm/kernels/choice.py is based on: our single kernel against the vendor's product and a pass.

    python tests/benchmarks/bench_products.py [--dtype bfloat16] [--repeats N] [--output FOLDER]

Needs a GPU. For each shape and direction it measures, alternating: only the vendor's product, rounded (the limit), our
single kernel (low_rank_matmul), and the vendor's product in fp32 followed by low_rank_add. They are captured in CUDA
graphs, so that launching them is not measured. Writes products.csv (microseconds, medians and quartiles) and prints it,
with the rate of our kernel as a fraction of the vendor's, which should be 0.85 or more at 4096 x 1280 x 1280.
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.testing

from dora_mm.eval.timing import alternate, seconds_of, summary
from dora_mm.kernels.choice import vendor_product
from dora_mm.kernels.low_rank_add import low_rank_add
from dora_mm.kernels.low_rank_matmul import low_rank_grad_input, low_rank_linear

SHAPES = (  # tokens, in, out
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
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("."))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_products: there is no GPU, and without one the kernels are only interpreted")
    device = torch.device("cuda")
    machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    rows = [
        {**machine, "dtype": arguments.dtype, **row}
        for shape in SHAPES
        for row in measure(shape, getattr(torch, arguments.dtype), device, arguments.repeats)
    ]
    with (arguments.output / "products.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print((arguments.output / "products.csv").read_text())


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict[str, object]]:
    """Times the products of one shape.

    Args:
        shape: Numbers of tokens, input features and output features.
        dtype: The dtype of the operands.
        device: Where to run.
        repeats: How many times each product is measured.

    Returns:
        A row per direction: medians and quartiles in microseconds, and the rate of our kernel as a fraction of the
        vendor's.
    """
    rows = []
    for direction, products in candidates(shape, dtype, device).items():
        times = alternate({name: partial(time_of, run, device) for name, run in products.items()}, repeats, int)
        row: dict[str, object] = {"tokens": shape[0], "in": shape[1], "out": shape[2], "direction": direction}
        found = {name: summary(seconds) for name, seconds in times.items()}
        for name, values in found.items():
            keys = (name, f"{name}, low", f"{name}, high")
            row |= {key: f"{1e6 * value:.1f}" for key, value in zip(keys, values, strict=True)}
        rows.append(row | {"share": f"{found['vendor alone'][0] / found['one kernel'][0]:.2f}"})
    return rows


def time_of(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds per run; on a GPU the mean over a CUDA graph of many runs."""
    if device.type == "cuda":
        return triton.testing.do_bench_cudagraph(run, rep=20) / 1e3
    return seconds_of(run, device)


def candidates(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    """The products to compare, as functions by direction and name."""
    tokens, inner, out = shape
    torch.manual_seed(0)
    x, dY, W0 = (
        torch.randn(*size, device=device, dtype=dtype) for size in ((tokens, inner), (tokens, out), (out, inner))
    )
    A, B, gain = (torch.randn(*size, device=device) for size in ((RANK, inner), (out, RANK), (out,)))
    h, u = x @ A.to(dtype).T, dY @ B.to(dtype)

    def forward_in_two() -> torch.Tensor:
        return low_rank_add(vendor_product(x, W0.T), None, gain, h, B, dtype)

    def backward_in_two() -> torch.Tensor:
        scaled = low_rank_add(dY, None, gain, None, None, dtype)
        return low_rank_add(vendor_product(scaled, W0), None, None, u, A.T, dtype)

    return {
        "forward": {
            "vendor alone": lambda: x @ W0.T,
            "one kernel": lambda: low_rank_linear(x, W0, None, gain, h, B),
            "vendor and a pass": forward_in_two,
        },
        "backward": {
            "vendor alone": lambda: dY @ W0,
            "one kernel": lambda: low_rank_grad_input(dY, W0, gain, u, A),
            "vendor and a pass": backward_in_two,
        },
    }


if __name__ == "__main__":
    main()

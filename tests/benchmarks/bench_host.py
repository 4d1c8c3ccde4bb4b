"""Measures the host's time: what the Python of one adapted Linear takes, forward and backward, beside its peers.

    python -m tests.benchmarks.bench_host [--label NAME] [--repeats N] [--rounds N] [--output FOLDER]

`gpu`: layers of 16 x 16 in bf16 on a CPU, whose arithmetic does not count. Of ours the path of a GPU runs, with
our launches left out: a Triton kernel does nothing, and the vendor's product only allocates. On a GPU each launch costs
some ten microseconds more, PEFT's and ours alike. `cpu`: small layers in fp32 in plain torch, with all they do.
PEFT's layer after `fuse_peft` is measured with norms that each pass computes, and inside `fixed_norms`.

All layers are measured in one process, in turns of seven passes, with base weights fixed as in the training loop. A
repeat is the median of its rounds. host.csv gets microseconds: the median of the repeats, the least and the largest.
Its rows of other labels stay.
"""

import argparse
import contextlib
import csv
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dora_mm import backend
from dora_mm.core import TORCH, DoRASpec, Forward, adapt_layer, fixed_parameters
from dora_mm.peft import fixed_norms
from tests.benchmarks.contenders import CONTENDERS, DENSE, fixed_bases, trained
from tests.benchmarks.results_table import write_rows

RANK = 16
IN_A_ROW = 7  # passes per turn, as many as a block has layers: in a model, a layer's code is in the processor's caches
PEERS = ("frozen", "PEFT LoRA", "PEFT DoRA")
FUSED = ("PEFT DoRA, fused", "PEFT DoRA, fused, norms kept")
SMALL = ((16, 16), (64, 64), (256, 64))  # features, tokens
KERNELS = ("adapter_grads", "low_rank_add", "low_rank_matmul", "operands", "output_grad", "row_norm")
Row = dict[str, Any]


class Launch:
    """Stands for a Triton kernel, and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


@contextlib.contextmanager
def without_launches(*, vendor: bool) -> Iterator[Forward]:
    """Yields the forward function of a GPU, which runs on a CPU and leaves our launches out.

    Args:
        vendor: Whether it takes the vendor's product and a pass, or our one kernel.
    """
    from dora_mm import kernels
    from dora_mm.kernels import dora_linear, scaled
    from dora_mm.peft import layers

    def allocated(a: Tensor, b: Tensor) -> Tensor:
        return torch.empty(a.shape[0], b.shape[1])

    replaced = {"INTERPRETED": True, "float_product": allocated, "vendor_is_faster": lambda *_, **__: vendor}
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(dora_linear, name, value))
        for module in (kernels.low_rank_matmul, scaled):
            stack.enter_context(mock.patch.object(module, "float_product", allocated))
        for name in KERNELS:
            stack.enter_context(mock.patch.object(getattr(kernels, name), f"_{name}", Launch()))
        stack.enter_context(mock.patch.dict(backend.CHOSEN, {False: dora_linear.TRITON}))
        stack.enter_context(mock.patch.object(layers, "crossing", return_value=0))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext))
        yield dora_linear.TRITON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "xeon_2_cores")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what our launches would write is left as it is found, and such numbers are slow
    rows = [{"label": given.label, **row} for row in measure(given.repeats, given.rounds)]
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    path = given.output / "host.csv"
    before = []
    if path.exists():
        with path.open(newline="") as file:
            before = [row for row in csv.DictReader(file) if row["label"] != given.label]
    write_rows(path, before + rows)


def measure(repeats: int, rounds: int) -> list[Row]:
    """The rows of all paths and sizes."""
    rows = []
    for has_vendor, name in ((True, "gpu, product and pass"), (False, "gpu, one kernel")):
        with without_launches(vendor=has_vendor) as forward:
            layers = contending(nn.Linear(16, 16, bias=False).to(torch.bfloat16), forward)
            rows += timed(name, layers, torch.randn(16, 16).to(torch.bfloat16), repeats, rounds)
    for features, tokens in SMALL:
        layers = contending(nn.Linear(features, features), TORCH)
        rows += timed("cpu", layers, torch.randn(tokens, features), repeats, rounds)
    return rows


def contending(base: nn.Linear, forward: Forward) -> dict[str, nn.Module]:
    """The layers by name, all over the weight of `base`."""
    base.requires_grad_(False)
    layers = {name: CONTENDERS[name](base, RANK).train() for name in PEERS}
    for name in FUSED:
        layers[name] = CONTENDERS["PEFT DoRA, fused"](base, RANK).train()
    layers["dense B@A"] = DENSE["dense B@A"](base, RANK)
    for method, name in (("lora", "our LoRA"), ("dora", "our DoRA")):
        layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        layer.weight, layer.bias = base.weight, base.bias
        layers[name] = adapt_layer(layer, DoRASpec(RANK, method=method), forward=forward)
    return layers


def timed(path: str, layers: dict[str, nn.Module], x: Tensor, repeats: int, rounds: int) -> list[Row]:
    """A row per layer and direction."""
    x, dY = x.requires_grad_(), torch.ones_like(x)
    medians: dict[tuple[str, str], list[float]] = {}
    with fixed_bases(layers.values()), fixed_norms(layers[FUSED[1]]):
        for _ in range(repeats):
            seconds: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for name, layer in itertools.chain.from_iterable([item] * IN_A_ROW for item in layers.items()):
                    for direction, found in zip(("forward", "backward"), step(layer, x, dY), strict=True):
                        seconds.setdefault((name, direction), []).append(found)
            for key, values in seconds.items():
                medians.setdefault(key, []).append(1e6 * statistics.median(values))
    return [
        {
            "path": path, "features": x.shape[1], "tokens": x.shape[0], "contender": name, "direction": direction,
            "median": f"{statistics.median(found):.1f}", "least": f"{min(found):.1f}", "largest": f"{max(found):.1f}",
            "repeats": repeats, "rounds": rounds, "torch": torch.__version__, "cores": os.cpu_count(),
        }
        for (name, direction), found in medians.items()
    ]  # fmt: skip


def step(layer: nn.Module, x: Tensor, dY: Tensor) -> tuple[float, float]:
    """The seconds of a forward and of a backward pass, as one step of the training loop makes them."""
    with fixed_parameters(layer, num_passes=1):
        start = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        torch.autograd.grad(y, [x, *trained(layer)], dY)
        return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    main()

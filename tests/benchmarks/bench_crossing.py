"""Measures from which size on a fused pass is faster than PEFT's own, by dtype and tokens, on one thread.

    python -m tests.benchmarks.bench_crossing [--rounds N] [--label NAME] [--output FOLDER]

One Linear, forward and backward, norms computed in each pass, as without `fixed_norms`; contenders take turns in one
process. LABEL.csv gets the medians in microseconds and their ratio. `dora_mm.peft.layers.crossing` errs on PEFT's
side of all that are in tests/benchmarks/results/crossing, which a test checks.
"""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn

from dora_mm import fuse_peft
from dora_mm.peft import layers as fused
from dora_mm.utils.devices import hardware_name
from tests.benchmarks.results_table import write_rows

SIDES = (64, 96, 128, 192, 256, 384, 512, 768)
TOKENS = (1, 16, 64, 256, 1024)
KINDS = {  # dtype of the base, whether adapters are cast up to float32, whether autocast is on
    "float32": (torch.float32, False, False),
    "bfloat16": (torch.bfloat16, False, False),
    "bfloat16, adapters in float32": (torch.bfloat16, True, False),
    "autocast": (torch.float32, False, True),
}


def layers(side: int, kind: str) -> dict[str, nn.Module]:
    """PEFT's layer, and the same one fused."""
    dtype, upcast, _ = KINDS[kind]
    found = {}
    for name in ("PEFT", "fused"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, use_dora=True, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(side, side, bias=False)).to(dtype), config, autocast_adapter_dtype=upcast
        )
        if name == "fused":
            fuse_peft(model)
        found[name] = model.base_model.model[0]
    return found


def step(layer: nn.Module, x: torch.Tensor, dY: torch.Tensor, autocast: bool) -> float:
    """The seconds of a forward and of a backward pass."""
    own = [p for p in layer.parameters() if p.requires_grad]
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    torch.autograd.grad(y, [x, *own], dY.to(y.dtype))
    return time.perf_counter() - start


def measure(side: int, tokens: int, kind: str, rounds: int) -> dict[str, Any]:
    """A row."""
    dtype, _, autocast = KINDS[kind]
    x, dY = torch.randn(tokens, side).to(dtype).requires_grad_(), torch.randn(tokens, side)
    found = {name: [] for name in ("PEFT", "fused")}
    with mock.patch.object(fused, "crossing", return_value=0):
        contending = layers(side, kind)
        for _ in range(rounds):
            for name, layer in contending.items():
                step(layer, x, dY, autocast)
                found[name].append(min(step(layer, x, dY, autocast) for _ in range(3)))
    medians = {name: 1e6 * statistics.median(values) for name, values in found.items()}
    return {
        "dtype": kind, "side": side, "tokens": tokens, "peft": f"{medians['PEFT']:.1f}",
        "fused": f"{medians['fused']:.1f}", "ratio": f"{medians['fused'] / medians['PEFT']:.3f}", "rounds": rounds,
        "machine": hardware_name(), "cores": os.cpu_count(), "torch": torch.__version__,
        "peft_version": peft.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--label", default="now", help="the name of the CSV file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "crossing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, tokens, side in itertools.product(KINDS, TOKENS, SIDES):
        rows.append(measure(side, tokens, kind, given.rounds))
        print("  ".join(str(value) for value in list(rows[-1].values())[:6]), flush=True)
    write_rows(given.output / f"{given.label}.csv", rows)


if __name__ == "__main__":
    main()

"""What it costs that weights wait in main memory, and whether copies run beside products: an entry of `make gpu`.

Decoder blocks of an 8B LLM, all seven linear layers adapted, with checkpointing: with all weights on the card, with
half of the blocks waiting, and with all. Gradients have to be equal in every bit.
"""

import gc
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_mm.core import DoRASpec, adapter_parameters, fixed_parameters, inject
from dora_mm.core.wrappers.streaming import bring, stream, window_of
from tests.benchmarks.gpu.block import RANK, Block, lengths, size_of
from tests.benchmarks.gpu.run import Row, Run, show
from tests.benchmarks.timing import alternate, seconds_of, summary

BLOCKS = 12  # of 436 MB each in bfloat16
SHARES = {"all stay": 0, "half wait": 2, "all wait": 1}  # every n-th block waits; 0: none


class Decoder(nn.Module):
    """Blocks with random weights, adapted; every n-th of them waits in main memory."""

    def __init__(self, run: Run, num_tokens: int, every: int):
        super().__init__()
        torch.manual_seed(0)
        size, place = size_of(run), {"device": run.device, "dtype": run.dtype}
        layers = (
            {name: nn.Linear(*sizes, bias=False, **place) for name, sizes in size.linear_layers().items()}
            for _ in range(3 if run.dry else BLOCKS)
        )
        self.blocks = nn.ModuleList(Block(size, found, num_tokens, run.dtype).to(run.device) for found in layers)
        self.requires_grad_(False)
        inject(self, list(size.linear_layers()), DoRASpec(rank=RANK, cache="norms"), forward=forward_of(run))
        if every:
            stream(list(self.blocks)[::every], run.device)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return x


def forward_of(run: Run) -> Any:
    from dora_mm import backend

    return backend.select(run.backend or "torch")


def run(run: Run) -> None:
    """Measures the three in turns at both lengths."""
    for block, num_tokens in lengths(run):
        name = block.replace("one block", f"{BLOCKS} blocks")
        if not run.is_cut(name):
            with run.trying("streaming", name):
                measure(run, name, num_tokens)
        gc.collect()


def measure(run: Run, name: str, num_tokens: int) -> None:
    """Times steps, compares gradients, and counts the bytes that were copied and that the card held at most."""
    size = size_of(run)
    x = torch.randn(num_tokens, size.width, device=run.device, dtype=run.dtype, requires_grad=True)
    decoders = {key: Decoder(run, num_tokens, every) for key, every in SHARES.items()}
    steps = {key: partial(seconds_of, partial(step, decoder, x), run.device) for key, decoder in decoders.items()}
    times = alternate(steps, run.rounds(7), int, run.is_late)
    window, whole, rows = window_of(run.device), None, []
    for key, decoder in decoders.items():
        before = window.copied
        peak = peak_of(run, decoder, x)
        copied, found = window.copied - before, gradients(decoder)
        whole = whole or found
        if not all(map(torch.equal, whole, found)):
            run.fail(f"{name}: gradients differ where {key}")
        alone = seconds_of(partial(copies, decoder), run.device) if copied else 0.0
        median, low, high = summary(times[key])[:3]
        ratio = median / summary(times["all stay"])[0]
        row: Row = {"case": name, "weights": key, "seconds": f"{median:.4f}", "ratio": f"{ratio:.3f}"}
        row |= {"from": f"{low:.4f}", "to": f"{high:.4f}", "copied GB": f"{copied / 1e9:.2f}"}
        rows.append(row | {"copying alone, s": f"{alone:.4f}", "peak GB": f"{peak / 1e9:.2f}"})
    run.save(rows)
    show(rows)


def step(decoder: Decoder, x: Tensor) -> None:
    """A forward and a backward pass."""
    decoder.zero_grad()
    with fixed_parameters(decoder):
        decoder(x).float().square().mean().backward()


def peak_of(run: Run, decoder: Decoder, x: Tensor) -> int:
    """The bytes that a step takes beyond what the other decoders have on the card; 0 on a CPU."""
    if run.device.type != "cuda":
        step(decoder, x)
        return 0
    own = sum(p.untyped_storage().nbytes() for p in decoder.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(decoder, x)
    return torch.cuda.max_memory_allocated() - before + own


def gradients(decoder: Decoder) -> list[Tensor]:
    return [p.grad.clone() for p in adapter_parameters(decoder).values() if p.grad is not None]


def copies(decoder: Decoder) -> None:
    """Brings all blocks that wait, twice, as a step does, without computing."""
    for block in (*decoder.blocks, *reversed(decoder.blocks)):
        bring(block)

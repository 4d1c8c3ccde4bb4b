"""Blocks that wait in main memory: how many an estimate asks for, what that saves on a GPU, and what is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dora_mm.config.streaming import Amount, amount_of
from dora_mm.core import TargetMap
from dora_mm.models.streaming import RESERVED, block_bytes, chosen, freed, least_that_frees, streamable_blocks
from dora_mm.utils.tables import aligned_columns

GPU_SIZES = (8, 12, 16, 24)  # GiB
PCIE = 25e9  # bytes a second that PCIe 4.0 x16 moves from pinned memory, of 32 in its name


class StreamPlan(NamedTuple):
    """The blocks of a network that is trained, and which of them wait.

    Attributes:
        sizes: The bytes of each block that can wait.
        waiting: The numbers of those that do.
        passes: Forward passes of an optimizer step.
        is_measured: Whether what a step brings was measured with it.
    """

    sizes: Sequence[int]
    waiting: Sequence[int] = ()
    passes: int = 1
    is_measured: bool = False

    @property
    def freed(self) -> int:
        """The bytes that the GPU has more, beside what a step brings."""
        return sum(self.sizes[i] for i in self.waiting) if self.is_measured else freed(self.sizes, self.waiting)


def stream_plan(
    network: nn.Module,
    targets: TargetMap | None,
    streamed: int | float | str | Amount | None,
    *,
    stored: Mapping[int, int] | None = None,
    passes: int = 1,
) -> StreamPlan:
    """The plan of a network, on any device.

    Args:
        network: The network.
        targets: Its target map; None: it has none.
        streamed: The key `memory.stream`, or what it says; of auto nothing waits yet.
        stored: The bytes of weights that will be quantised, by `id`.
        passes: See `StreamPlan`.
    """
    sizes = block_bytes(streamable_blocks(network, targets), stored)
    if streamed is None or streamed == "auto":
        return StreamPlan(sizes, passes=passes)
    amount = streamed if isinstance(streamed, Amount) else amount_of(streamed)
    return StreamPlan(sizes, chosen(sizes, amount), passes)


def streamed_table(total: int, plan: StreamPlan) -> str:
    """A text table of what streaming takes: as the plan has it, and what GPUs of usual sizes need.

    Args:
        total: The bytes of a step of which nothing waits.
        plan: The blocks.
    """
    header = ("streamed", "blocks that wait", "GB on the GPU", "in main memory", "copied a step", "at 25 GB/s")
    rows: list[tuple[str, ...]] = [header]
    if plan.waiting:
        rows.append(("as configured", *_numbers(total, plan)))
    for size in GPU_SIZES:
        room = size * 1024**3 - RESERVED
        amount = least_that_frees(plan.sizes, total - room)
        needed = plan._replace(waiting=chosen(plan.sizes, amount) if amount else ())
        fits = total - needed.freed <= room
        rows.append((f"on {size} GB", *(_numbers(total, needed) if fits else ["does not fit", *[""] * 4])))
    return aligned_columns(rows, num_text=2)


def _numbers(total: int, plan: StreamPlan) -> list[str]:
    moved = sum(plan.sizes[i] for i in plan.waiting)
    copied = 2 * moved * plan.passes  # forward and backward; a block that is computed again is there already
    numbers = [f"{size / 1e9:.1f}" for size in (total - plan.freed, moved, copied)]
    return [f"{len(plan.waiting)} of {len(plan.sizes)}", *numbers, f"{copied / PCIE:.1f} s"]

"""One process or several: `accelerate launch` and torchrun start them, and a training joins them here."""

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

LONGEST_WAIT = timedelta(hours=12)  # of the other processes for the main one, such as for a validation


def join_processes(mixed_precision: str, *, find_unused_parameters: bool = False) -> Accelerator:
    """Joins the processes that were started together, on GPUs or on the CPU; the usual case is a single one.

    From then on only the main process informs; the others only warn.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        find_unused_parameters: Whether a step may leave trained parameters without a gradient, as DDP has to know.

    Raises:
        ValueError: Accelerate would take each of them for the only one.
    """
    handlers = [
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
    ]
    # Without a GPU accelerate joins processes only if it is told that they are to use the CPU.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=handlers)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but on {accelerator.device} only {accelerator.num_processes} can train "
            "together: start a single one"
        )
    if not accelerator.is_main_process:
        logging.getLogger("dora_mm").setLevel(logging.WARNING)
    return accelerator


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Lets the main process run a block before the others, which then find the files that it has written.

    After a mistake in the block the others run it as well, and report the same instead of a lost connection.
    """
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()

"""Runs a function in two processes of one group (gloo), which are forked from a server that has imported everything."""

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_fsdp = pytest.mark.skipif(not dist.is_gloo_available(), reason="fully_shard needs gloo here")
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "dora_mm.core"]  # a new interpreter takes seconds for them


def run_in_two(folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function of a test's module with (rank, *arguments) in both; errors in them are raised."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    store = folder / f"store-{time.monotonic_ns()}"
    given = (str(store), function, arguments)
    torch.multiprocessing.start_processes(_in_group, given, nprocs=2, start_method="forkserver")


def _in_group(rank: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # says where a process was when it is aborted
    torch.set_num_threads(1)
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {**numbers, "MASTER_ADDR": "localhost"}  # as a launcher does, for accelerate
    timeout = timedelta(seconds=300)  # on a machine that does other things as well
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()

"""One process or several: `accelerate launch` and torchrun start them, and a training joins them here."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dora_mm.config.training import TrainConfig
from dora_mm.core.wrappers.float8 import STORED
from dora_mm.core.wrappers.sharded import is_sharded
from dora_mm.core.wrappers.streaming import is_streamed
from dora_mm.data.seen import SeenFiles
from dora_mm.utils.run_directory import RunDirectory

log = logging.getLogger(__name__)
ValueT = TypeVar("ValueT")
LONGEST_WAIT = timedelta(hours=12)  # of the other processes for the main one, such as for a validation

# Variables that accelerate, transformers and PEFT read as switches and no argument overrides; and the key that decides
SWITCHES = {
    **dict.fromkeys((f"ACCELERATE_USE_{each}" for each in ("FSDP", "DEEPSPEED", "MEGATRON_LM")), "train.shard"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train.shard",
    "ACCELERATE_DOWNCAST_BF16": "train.mixed_precision",
    "ACCELERATE_INIT_INCLUDE_BUFFERS": "model.path",  # diffusers would leave out what files of weights do not hold
}


@dataclass
class GradientSharing(DistributedDataParallelKwargs):
    """Options of DDP, with one that accelerate does not have.

    Attributes:
        init_sync: Whether the first process sends its weights to the others at the start.
    """

    init_sync: bool = True


def join_processes(train: TrainConfig, *, find_unused_parameters: bool = False) -> Accelerator:
    """Joins the processes that were started together, on GPUs or on the CPU; the usual case is a single one.

    From then on only the main process informs; the others only warn. The environment decides on which devices to train,
    and the config how: variables of `accelerate launch` that contradict it have no effect.

    Args:
        train: The `train` section of the config.
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
    overridden = _overridden(train)
    for name in SWITCHES:
        os.environ.pop(name, None)
    accelerator = Accelerator(
        mixed_precision=train.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates by itself
        dynamo_backend="no",  # the recipes compile by themselves
        cpu=on_cpu,
        kwargs_handlers=handlers,
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but on {accelerator.device} only {accelerator.num_processes} can train "
            "together: start a single one"
        )
    if not accelerator.is_main_process:
        logging.getLogger("dora_mm").setLevel(logging.WARNING)
    elif overridden:
        log.warning("The config decides how to train, so these variables have no effect: %s", ", ".join(overridden))
    return accelerator


def _overridden(train: TrainConfig) -> list[str]:
    """The variables of accelerate that differ from a config, each with the key that decides instead."""
    decided = {
        "ACCELERATE_MIXED_PRECISION": ("train.mixed_precision", train.mixed_precision),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "train.gradient_accumulation_steps",
            str(train.gradient_accumulation_steps),
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("train.compile", "no"),
        **{name: (key, "false") for name, key in SWITCHES.items()},
    }
    given = {name: os.environ.get(name, value) for name, (_, value) in decided.items()}
    return [f"{name}={given[name]} ({key})" for name, (key, value) in decided.items() if given[name].lower() != value]


def check_can_shard(accelerator: Accelerator, train: TrainConfig) -> None:
    """Checks that there are processes to divide a model among, where it is to be divided.

    Raises:
        ValueError: There is a single one.
    """
    if train.shard and accelerator.num_processes == 1:
        raise ValueError("train.shard divides the model among processes, and this is the only one: start several")


def by_main_process(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Has the main process do something, for which the others wait.

    Raises:
        ValueError: The main process raises it, and then all do, so that none waits for the others.
    """
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except ValueError as error:
            problem = [str(error)]
    if found := broadcast_object_list(problem)[0]:
        raise ValueError(found)


def share_seen(accelerator: Accelerator, files: SeenFiles) -> None:
    """Tells every process which files the others have read, since one writes the checkpoints.

    Args:
        accelerator: Knows the processes, all of which have to call this.
        files: Those of this process.

    Raises:
        ChangedFileError: Two have read another content of a file.
    """
    if accelerator.num_processes > 1:
        for found in gather_object([files.unshared()]):
            files.add(found)


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


def with_shared_gradients(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Wraps a module so that gradients are averaged over the processes, if there are several.

    What `fully_shard` has divided is frozen, and left to it; weights in float8 are frozen, and gloo cannot send them;
    what waits in main memory has no memory to send.
    Nothing is sent at the start then: trained parameters are sampled from the same seed, or read from the same file, in
    all processes.
    """
    if accelerator.num_processes == 1:
        return module
    streams = any(map(is_streamed, module.modules()))
    if streams or any(is_sharded(parameter) or parameter.dtype == STORED for parameter in module.parameters()):
        options: Any = accelerator
        unused = options.ddp_handler is not None and options.ddp_handler.find_unused_parameters
        options.ddp_handler = GradientSharing(find_unused_parameters=unused, init_sync=False)
    wrapped = accelerator.prepare_model(module, device_placement=not streams)  # where it is already
    assert isinstance(wrapped, DistributedDataParallel)  # accelerate returns other things without a word
    return wrapped


def takes_part(accelerator: Accelerator, train: TrainConfig) -> bool:
    """Whether this process takes part where the main one generates, answers or saves.

    All do where a model is sharded, since each has a part of it.
    """
    return accelerator.is_main_process or train.shard


def of_all_processes(numbers: list[int], accelerator: Accelerator) -> list[list[int]]:
    """The numbers of each process, in the order of processes."""
    if accelerator.num_processes == 1:
        return [numbers]
    found: Any = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    return found.tolist()


def from_main_process(value: ValueT) -> ValueT:
    """The value of the main process, in each of those that were joined."""
    return broadcast_object_list([value])[0]


@contextlib.contextmanager
def answering(accelerator: Accelerator, train: TrainConfig, run: RunDirectory, request: str) -> Iterator[bool]:
    """As `run.answering`, in each process that takes part; the main one reads the request."""
    with run.answering(request) if accelerator.is_main_process else contextlib.nullcontext(False) as requested:
        yield broadcast_object_list([requested])[0] if train.shard else requested

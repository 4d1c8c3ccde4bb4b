"""Cost of a training before it starts: memory by part, time of a measured step, and slow hardware."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_mm.config.training import EMAConfig, OptimizerConfig, ScheduleConfig, TrainConfig, ValidationConfig
from dora_mm.core import fixed_parameters
from dora_mm.train.loop import LossModule, accumulate, update
from dora_mm.train.preflight import Problems, finished_steps, stop_at
from dora_mm.train.run import check_length
from dora_mm.utils.losses import LossSum
from dora_mm.utils.messages import raised_by_us
from dora_mm.utils.progress import Progress, duration

LARGE = 500_000_000  # parameters; a training step of a model this large takes minutes on a CPU
LONG = 5e11  # parameters times tokens of a batch; some 3e12 operations, half a minute on two cores
SLOWER = 4.0  # half precision that is this much slower than float32 is emulated: 16 times slower where it was measured
BUDGET = 20.0  # seconds after which no further step is measured
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOO_SLOW = "a step of this model takes minutes to hours without a GPU"
SHARDED = "a step of a sharded model takes all of its processes"
MEASURED, KEPT = "measured", "an estimate: what a step keeps for its backward pass"


def print_page(sections: Iterable[str], problems: Problems, *, shown: bool = True) -> None:
    """Prints the page of a dry run, and then reports why the training would be refused.

    Args:
        sections: The sections of the page. An error that ends them early is reported with the others.
        problems: Those found ahead of the page, which may add some.
        shown: Whether to print the page; of several processes one does.

    Raises:
        ValueError: The training would be refused; the message has all problems.
    """
    try:
        for section in sections:
            if shown:
                print(section, end="\n\n", flush=True)
    except ValueError as error:
        if not raised_by_us(error):  # a bug
            raise
        problems = {**problems, "page": [str(error)]}
    stop_at(problems)


class StepCost(NamedTuple):
    """The cost of one optimizer step.

    Attributes:
        seconds: Of the fastest of up to three steps; None: none was measured.
        activations: Bytes beyond weights, gradients and optimizer state.
        source: Where `activations` is from: MEASURED, on a GPU; KEPT, what autograd keeps, without temporary buffers;
            or another estimate, for a person to read.
    """

    seconds: float | None
    activations: int
    source: str


def measure_step(
    *,
    accelerator: Accelerator,
    config: TrainConfig,
    seed: int,
    networks: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch_at: Callable[[int], Any],
    loss: Callable[[Any, torch.Generator], LossSum],
    largest: Callable[[int], Any] | None = None,
) -> StepCost:
    """Trains for up to three steps, all on the first batch, and measures them.

    The arguments are those of `fit`, and `largest`: whose first batch is the one that memory is measured with, instead.
    """
    trained, device = LossModule(networks, loss), accelerator.device
    largest = largest or batch_at

    def step(batches: Callable[[int], Any]) -> tuple[float, int]:
        """The seconds of a step, and its peak memory beyond what was there before, in bytes."""
        (allocated, _), started = _peak_memory(device), time.monotonic()
        with fixed_parameters(trained.networks, num_passes=config.gradient_accumulation_steps):
            accumulate(accelerator, trained, config, seed, 0, lambda number: batches(0))
        update(accelerator, parameters, optimizer, schedule, config.max_grad_norm)
        _, peak = _peak_memory(device)  # waits for the GPU
        return time.monotonic() - started, peak - allocated

    times = []
    with Progress("measuring a step"):
        while len(times) < 3 and sum(times) < BUDGET:
            times.append(step(batch_at)[0])
        if device.type != "cuda":
            return StepCost(min(times), _kept_for_backward(accelerator, trained, config, seed, largest), KEPT)
        _, peak = step(largest)
    return StepCost(min(times), max(0, peak - num_bytes(parameters.values())), MEASURED)


def measure_accumulated(
    training: Mapping[str, Any],
    batch_at: Callable[[int], Any],
    *,
    prepared: bool,
    largest: Callable[[int], Any] | None = None,
) -> StepCost:
    """As `measure_step`, by one micro-batch where a step accumulates the gradients of several.

    Args:
        training: The arguments of `measure_step` but for the batches.
        batch_at: Maps the number of a micro-batch to it.
        prepared: Batches are prepared in parallel to the steps, so that a step takes as long as the slower of both.
        largest: As in `measure_step`.
    """
    count = training["config"].gradient_accumulation_steps
    single = training["config"].model_copy(update={"gradient_accumulation_steps": 1})
    started = time.monotonic()
    first = batch_at(0)
    preparing = time.monotonic() - started if prepared else 0.0
    batches = (lambda number: first) if prepared else batch_at
    cost = measure_step(**{**training, "config": single}, batch_at=batches, largest=largest)
    assert cost.seconds is not None
    return cost._replace(seconds=count * max(cost.seconds, preparing))


def _peak_memory(device: torch.device) -> tuple[int, int]:
    """The allocated GPU memory and its peak since the last call, in bytes; zeros on a CPU."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _storages(tensor: torch.Tensor) -> dict[int, int]:
    """The bytes of a tensor's storages, by data pointer."""
    storages = [part.untyped_storage() for part in _parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor; of torchao's, which have no memory of their own, those inside."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _kept_for_backward(accelerator, trained, config, seed, batch_at) -> int:
    """The bytes that the forward pass of one micro-batch keeps for its backward pass, parameters not counted."""
    known = {pointer for parameter in trained.parameters() for pointer in _storages(parameter)}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.update({pointer: size for pointer, size in _storages(tensor).items() if pointer not in known})
        return tensor

    single = config.model_copy(update={"gradient_accumulation_steps": 1})
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), fixed_parameters(trained.networks):
        accumulate(accelerator, trained, single, seed, 0, batch_at)
    for parameter in trained.parameters():
        parameter.grad = None
    return sum(kept.values())


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The memory that these tensors take."""
    return sum(part.numel() * part.element_size() for tensor in tensors for part in _parts(tensor))


def time_line(cost: StepCost, steps: int, left_out: str, by_resolution: Mapping[int, float] | None = None) -> str:
    """A line with the measured time of a step and that of a whole training, without what is left out of it.

    Args:
        cost: Of a step on average.
        steps: The number of steps.
        left_out: What the time does not include.
        by_resolution: The seconds of a step by the resolution of its images; None, or of one: they are all alike.
    """
    assert cost.seconds is not None
    shown, source = duration(cost.seconds * steps), "measured"
    if by_resolution and len(by_resolution) > 1:
        each = ", ".join(f"{seconds:.2f} s at {resolution}" for resolution, seconds in by_resolution.items())
        source = f"on average; measured: {each}"
    return f"time      {cost.seconds:.2f} s a step ({source}), {shown} for {steps:,} steps, {left_out} not included"


def left_lines(resume: Path | None, steps: int) -> list[str]:
    """A line with the steps that are left of a training, where some are finished; else nothing.

    Args:
        resume: The run directory to resume; None: a new run would start.
        steps: The length of the training.

    Raises:
        ValueError: The run has finished more.
    """
    done = finished_steps(resume)
    if resume:
        check_length(resume, done, steps)
    return [f"left      {steps - done:,} of {steps:,} steps: {done:,} are finished"] if done else []


def length_line(train: TrainConfig, steps_per_epoch: int) -> str:
    """A line with the length of a training in steps and epochs.

    Args:
        train: The `train` section, with its number of steps.
        steps_per_epoch: Optimizer steps in one pass over the data.
    """
    count = train.gradient_accumulation_steps
    of_several = f"; up to {count} batches per step" if count > 1 else ""
    epochs = f"{train.steps / steps_per_epoch:.3g}"
    total, each = (f"{number:,} step{'s' if number > 1 else ''}" for number in (train.steps, steps_per_epoch))
    return f"length    {total}, {epochs} epoch{'s' if epochs != '1' else ''} of {each}{of_several}"


def optimizer_line(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int, ema: EMAConfig | None = None
) -> str:
    """A line with the optimizer, the learning rates that hold for all parts, their schedule, and the average."""
    rates = [f"lr {optimizer.lr:.4g}"]
    rates += [f"B {optimizer.b_lr_ratio:.4g} times that"] if optimizer.b_lr_ratio != 1 else []
    rates += [f"m {optimizer.magnitude_lr:.4g}"] if optimizer.magnitude_lr is not None else []
    options = [f"{key} {value}" for key, value in optimizer.options.items()]
    warmup = schedule.warmup_steps or round(schedule.warmup_ratio * steps)
    after = f" after {warmup:,} step{'s' if warmup > 1 else ''} of warm-up" if warmup else ""
    average = f"; an average of the weights with decay {ema.decay:g}" if ema else ""
    return f"optimizer {optimizer.name}, {', '.join(rates + options)}; {schedule.name}{after}{average}"


def per_example_line(evaluate: ValidationConfig, count: int, passes: int, steps: int) -> list[str]:
    """A line with the cost of the loss of each image or row; none where it is not measured.

    Args:
        evaluate: The `evaluate` section.
        count: The number of images or rows.
        passes: The images or rows that one measurement passes forward.
        steps: The length of the training.
    """
    every = evaluate.per_example_every
    if every is None:
        return []
    times = 2 + (-(-steps // every) - 1 if every else 0)
    return [f"each      the loss of each of {count:,}: {passes:,} forward passes, {times} times in the training"]


def when(evaluate: ValidationConfig, steps: int | None = None) -> str:
    """How often a training of this number of steps validates, and how it ends early; None: it is not known."""
    if not evaluate.every or (steps is not None and evaluate.every >= steps):
        return "at the end"
    early = f", and the end after {evaluate.patience} without a better one" if evaluate.patience else ""
    interval = "step" if evaluate.every == 1 else f"{evaluate.every:,} steps"
    return f"after every {interval}{early}"


def why_not_measured(
    accelerator: Accelerator, networks: Iterable[nn.Module], *, shard: bool, num_tokens: int = 1, tower_work: int = 0
) -> str | None:
    """Why a step of these networks is not measured ahead of a training; None if it is.

    Args:
        accelerator: Knows the device.
        networks: The networks.
        shard: Whether processes divide them.
        num_tokens: The tokens of a batch, where a step takes longer for more of them.
        tower_work: Parameters times patches of a tower, which may have many for few tokens.
    """
    if shard:
        return SHARDED
    size = _num_parameters(networks)
    short = accelerator.device.type != "cpu" or (size < LARGE and size * num_tokens + tower_work < LONG)
    return None if short else TOO_SLOW


def _num_parameters(networks: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def slow_hardware(accelerator: Accelerator, networks: Iterable[nn.Module] | None) -> list[str]:
    """Warnings about a training that will take far longer than its user may expect; usually none.

    Args:
        accelerator: Knows the device and the mixed precision of the training.
        networks: All networks of the model; None: they are not on this machine, as is usual for large ones.
    """
    if accelerator.device.type != "cpu":
        return []
    found, mixed_precision = [], accelerator.mixed_precision
    if networks is None:
        found.append("There is no GPU: a step of a model of full size takes minutes to hours here.")
    elif (num_parameters := _num_parameters(networks)) >= LARGE:
        found.append(
            f"There is no GPU, and the model has {num_parameters / 1e9:.1f} billion parameters: a step takes minutes "
            "to hours here."
        )
    if mixed_precision in PRECISIONS and (ratio := half_precision_slowdown(PRECISIONS[mixed_precision])) > SLOWER:
        found.append(
            f"This processor emulates {mixed_precision}, some {ratio:.0f} times slower than float32: train in float32 "
            "instead (train.mixed_precision=no)."
        )
    return found


def half_precision_slowdown(dtype: torch.dtype) -> float:
    """How many times longer a small product takes in this dtype than in float32 on the processor; a few ms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, starting a second one takes longer than the product
    try:
        return _product_seconds(dtype) / _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    matrix, times = torch.ones(128, 128, dtype=dtype), []
    for _ in range(5):  # the first one is a warm-up
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)

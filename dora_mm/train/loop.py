"""The training loop that every pipeline runs."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dora_mm.config.training import TrainConfig
from dora_mm.core import fixed_parameters
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.tools import native
from dora_mm.train.checkpoint import (
    Stateful,
    checkpoints,
    is_due,
    keep_newest,
    last_step,
    load_checkpoint,
    save_checkpoint,
)
from dora_mm.train.interrupt import DeferredInterrupt
from dora_mm.train.metrics import MetricsLog, TrainingProgress
from dora_mm.train.processes import with_shared_gradients
from dora_mm.train.run import DivergedError
from dora_mm.utils.losses import LossSum, PassResult
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import SAVE_NOW, RunDirectory

log = logging.getLogger(__name__)
Hook = Callable[[int], None]
Passes = Callable[[], PassResult]
AGAIN = (
    "and would be again in a resumed run with this optimizer.lr: go on with a lower one (--resume RUN --set "
    "optimizer.lr=...), or start a new run in float32 or bf16."
)


def fit(
    *,
    accelerator: Accelerator,
    run: RunDirectory,
    config: TrainConfig,
    seed: int,
    networks: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch_at: Callable[[int], Any],
    loss: Callable[[Any, torch.Generator], LossSum],
    state: Mapping[str, Stateful] | None = None,
    before_step: Hook | None = None,
    wrap_gradients: Callable[[int, Passes], PassResult] = lambda step, passes: passes(),
    after_step: Hook | None = None,
    on_step_end: Hook | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Trains until `config.steps` optimizer steps are done, or `should_stop` says so.

    If the run directory holds checkpoints, training resumes from the newest one. The contents of a batch depend only
    on its number, and all randomness of the loss comes from (seed, batch number), so a resumed run repeats an
    uninterrupted one bit for bit. An interruption (KeyboardInterrupt) saves a checkpoint and is raised again.

    Args:
        accelerator: Supplies device and mixed precision, and averages gradients over processes.
        run: The directory that receives checkpoints and metrics.
        config: The training settings.
        seed: Seed of the loss and of dropout.
        networks: The networks that hold the parameters, by name. With several processes, their gradients are averaged
            once per optimizer step.
        parameters: The trained parameters by name; a checkpoint stores these.
        optimizer: The optimizer over `parameters`, prepared by `accelerator`.
        schedule: The learning-rate schedule; advanced once per optimizer step.
        batch_at: Maps the number of a micro-batch to this process's share of it.
        loss: Maps (batch, generator) to the loss of a batch. An optimizer step minimises the sum of all of its batches,
            over accumulation and processes, divided by the sum of their counts.
        state: Further objects that a checkpoint must restore, such as an EMA, by name.
        before_step: Called with the number of finished steps ahead of each step; for what depends on that number alone,
            such as parameters that are trained up to some step.
        wrap_gradients: Called with the same number and with what computes the gradients of the step, which it has to
            call once, and whose result it returns: it may read what the passes compute, and changes none of it.
        after_step: Called with the number of finished steps; for work that belongs to the step, such as an EMA update.
        on_step_end: Called after `after_step` with the same number; for work that does not affect training, such as
            validation. A call that was interrupted is repeated by the resumed run.
        should_stop: Whether to stop, called before each step; a resumed run must get the same answers.
        metadata: What the headers of adapter files have, for the checkpoints, whose weights are adapter files as well.

    Returns:
        The number of finished optimizer steps, those before this call included.

    Raises:
        DivergedError: The loss or a parameter is not finite.
        ValueError: The newest checkpoint cannot be loaded.
    """
    trained = LossModule(networks, loss)
    shared = with_shared_gradients(accelerator, trained)
    pending = _PendingHook()
    progress = TrainingProgress(config.steps, config.log_every, shown=accelerator.is_main_process)
    parts: dict[str, Stateful] = {"optimizer": optimizer, "schedule": schedule, "hook": pending, "progress": progress}
    parts |= state or {}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    header = {**(metadata or {}), **native.header_of(networks, parameters)}
    record = _TrainingRecord(run, config, parameters, parts, header, writes=accelerator.is_main_process)
    progress.start(record.first)

    def take_step() -> None:
        if before_step is not None:
            before_step(record.step)
        rate = float(schedule.get_last_lr()[0])
        passes = fixed_parameters(trained.networks, num_passes=config.gradient_accumulation_steps)
        compute = partial(accumulate, accelerator, shared, config, seed, record.step, batch_at)
        with passes:
            loss_of_step = wrap_gradients(record.step, compute).loss
        if record.step == record.first and accelerator.is_main_process:
            _warn_of_unreached(parameters)
        norm = update(accelerator, parameters, optimizer, schedule, config.max_grad_norm)
        value, norm = torch.stack([loss_of_step, norm.to(loss_of_step)]).tolist()  # one read from a GPU
        record.step += 1
        pending.interrupted = on_step_end is not None  # from now on, also by a signal during this step
        if not math.isfinite(value):
            raise DivergedError(f"The loss is {value} at step {record.step}, {AGAIN}")
        progress.advance(value, rate)
        record.log(progress, rate, norm)
        if after_step is not None:
            after_step(record.step)

    interrupt = DeferredInterrupt()
    try:
        with fixed_parameters(trained.networks, base_only=True):  # the base weights are never trained here
            pending.run(on_step_end, record.step, only_interrupted=True)
            while record.step < config.steps and not should_stop():
                with interrupt:
                    take_step()
                if record.is_due:  # before `on_step_end` scores or draws them
                    record.check_trained()
                pending.run(on_step_end, record.step)
                record.save_if_wanted(should_stop)
    except KeyboardInterrupt:
        record.save_interrupted()
        raise
    finally:
        progress.close()
        record.close()
    return record.step


class _TrainingRecord:
    """The state of a training: its step, and the metrics and checkpoints that the main process writes.

    Args:
        run: The run directory; a training resumes from its newest checkpoint.
        config: The training settings.
        parameters: The trained parameters by name.
        parts: Everything else that a checkpoint has.
        header: Metadata of the weights of checkpoints.
        writes: Whether this is the main process.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        parameters: Mapping[str, nn.Parameter],
        parts: Mapping[str, Stateful],
        header: Mapping[str, str],
        *,
        writes: bool,
    ):
        self.run, self.config, self.parameters, self.parts, self.header = run, config, parameters, parts, header
        found = checkpoints(run.checkpoints)
        self.step = self.first = load_checkpoint(found[-1], parameters, parts) if found else 0
        self.metrics = MetricsLog(run, self.first) if writes else None
        if writes:
            keep_newest(run.checkpoints, config.keep_checkpoints)  # a kill may have left one more

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint belongs to this step."""
        return is_due(self.config, self.step)

    def log(self, progress: TrainingProgress, rate: float, norm: float) -> None:
        """Writes a row of metrics where one, or a checkpoint, belongs to this step."""
        if self.metrics is not None and (self.step % self.config.log_every == 0 or self.is_due):
            losses = {"loss": progress.mean_loss, "last_loss": progress.take_last_loss()}
            self.metrics.write(self.step, **losses, lr=rate, grad_norm=norm, seconds=progress.seconds)

    def check_trained(self) -> None:
        if name := first_not_finite((name, parameter.detach()) for name, parameter in self.parameters.items()):
            saved = last_step(self.run.checkpoints)
            kept = f"the checkpoint of step {saved} stays as it is" if saved else "nothing was saved"
            raise DivergedError(f"{name} has values that are NaN or infinite after step {self.step} ({kept}), {AGAIN}")

    def save_if_wanted(self, should_stop: Callable[[], bool]) -> None:
        """Saves a checkpoint if one is due or was requested, or before the training stops."""
        if self.metrics is None:
            return
        with self.run.answering(SAVE_NOW) as requested:
            wanted = requested or should_stop()
            if wanted and not self.is_due:
                self.check_trained()
            if self.is_due or wanted:
                self.save()

    def save_interrupted(self) -> None:
        if self.step > self.first:
            self.check_trained()
            self.save()

    def save(self) -> None:
        """Without waiting for the other processes, which may be in the middle of a step when interrupted."""
        if self.metrics is not None:
            self.metrics.sync()
            keep, folder = self.config.keep_checkpoints, self.run.checkpoints
            save_checkpoint(folder, self.step, self.parameters, self.parts, keep, self.header)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def _warn_of_unreached(parameters: Mapping[str, nn.Parameter]) -> None:
    """Warns of parameters without a gradient: the loss does not depend on them, so they stay as they are."""
    unreached = [name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None]
    if unreached:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in unreached))
        shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
        log.warning(
            "The first step did not use %d of the trained layers: %s. They do not train until a step uses them "
            "(docs/train_images.md, Parts).",
            *(len(layers), shown),
        )


class _PendingHook:
    """Remembers in a checkpoint that `on_step_end` was interrupted, so that a resumed run calls it again."""

    def __init__(self):
        self.interrupted = False

    def run(self, hook: Hook | None, step: int, *, only_interrupted: bool = False) -> None:
        """Calls `hook`; with `only_interrupted`, only if its last call did not finish."""
        if hook is not None and (self.interrupted or not only_interrupted):
            self.interrupted = True
            hook(step)
        self.interrupted = False

    def state_dict(self) -> dict[str, bool]:
        return {"interrupted": self.interrupted}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.interrupted = state_dict["interrupted"]


class LossModule(nn.Module):
    """The loss as a module that contains the trained networks, because accelerate synchronises gradients by module."""

    def __init__(self, networks: Mapping[str, nn.Module], loss: Callable[[Any, torch.Generator], LossSum]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.loss = loss

    def forward(self, batch: Any, stream: torch.Generator) -> LossSum:
        return self.loss(batch, stream)


def accumulate(
    accelerator: Accelerator,
    trained: nn.Module,
    config: TrainConfig,
    seed: int,
    step: int,
    batch_at: Callable[[int], Any],
) -> PassResult:
    """Computes the gradients of one optimizer step: of sum over count of its micro-batches, on all processes.

    The count of a whole step is known only behind its last micro-batch. Until then each is divided by the count that
    the first one leads to expect, and where others differ, the gradients are scaled at the end.

    Args:
        accelerator: As in `fit`, like all others that are not listed here.
        trained: The LossModule, prepared by `accelerator` if there are several processes.
        config: The training settings.
        seed: Seed of the loss and of dropout.
        step: The number of finished steps.
        batch_at: Maps the number of a micro-batch to this process's share of it.
    """
    micro_batches, expected = config.gradient_accumulation_steps, torch.zeros(())
    sums = torch.zeros(2, device=accelerator.device)
    for micro in range(micro_batches):
        number = step * micro_batches + micro
        # Of all batches, as one process would number them: it then draws the same.
        num_batches = number * accelerator.num_processes + accelerator.process_index
        stream = generator(seed, num_batches, "loss 0", accelerator.device)
        dropout_seed = generator(seed, num_batches, "dropout 0").initial_seed()
        last = micro + 1 == micro_batches
        gradient_sync = contextlib.nullcontext() if last else accelerator.no_sync(trained)
        with seeded_dropout(dropout_seed, accelerator.device), gradient_sync:
            with accelerator.autocast():
                loss = trained(batch_at(number), stream)
            if micro == 0:
                expected = LossSum(loss.total, _over_processes(accelerator, loss.count)).divisor
            # DDP takes the mean of the gradients over processes, not their sum
            accelerator.backward(loss.total * accelerator.num_processes / expected / micro_batches)
        sums += torch.stack([loss.total.detach().float(), loss.count.float()])
    total = LossSum(*_over_processes(accelerator, sums))
    scale = torch.tensor(accelerator.num_processes * (accelerator.scaler.get_scale() if accelerator.scaler else 1))
    if micro_batches > 1:
        correction = micro_batches * expected / total.divisor
        if gradients := [p.grad for p in trained.parameters() if p.grad is not None]:
            torch._foreach_mul_(gradients, correction)
        scale = scale / correction
    return PassResult(total.mean, scale)


def _over_processes(accelerator: Accelerator, values: torch.Tensor) -> Any:
    """The sum of these values over all processes."""
    return accelerator.reduce(values.detach().clone(), "sum") if accelerator.num_processes > 1 else values


@contextlib.contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's global generators, from which dropout samples, and restores their state on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def update(
    accelerator: Accelerator,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float | None,
) -> torch.Tensor:
    """Clips the accumulated gradients, takes one step of optimizer and schedule, and returns the gradients' norm ()."""
    members = list(parameters.values())
    if max_grad_norm is None:
        accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
    else:
        norm = torch.as_tensor(accelerator.clip_grad_norm_(members, max_grad_norm))
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # fp16 skips the step whose gradients overflowed
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

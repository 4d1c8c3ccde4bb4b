"""The training loop that every pipeline runs."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from dora_mm.config.training import TrainConfig
from dora_mm.core import fixed_parameters
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.tools import native
from dora_mm.train.checkpoint import Stateful, checkpoints, last_step, load_checkpoint, save_checkpoint
from dora_mm.train.interrupt import DeferredInterrupt
from dora_mm.train.metrics import MetricsLog
from dora_mm.train.optim import gradient_norm
from dora_mm.train.run import DivergedError
from dora_mm.utils.losses import LossSum
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import SAVE_NOW, RunDirectory

log = logging.getLogger(__name__)
Hook = Callable[[int], None]
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
    after_step: Hook | None = None,
    observe: Hook | None = None,
    is_over: Callable[[], bool] = lambda: False,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Trains until `config.steps` optimizer steps are done, or `is_over` says so.

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
        after_step: Called with the number of finished steps; for work that belongs to the step, such as an EMA update.
        observe: Called after `after_step` with the same number; for work that does not affect training, such as
            validation. A call that was interrupted is repeated by the resumed run.
        is_over: Whether to stop, asked before each step; a resumed run must get the same answers.
        metadata: What the headers of adapter files have, for the checkpoints, whose weights are adapter files as well.

    Returns:
        The number of finished optimizer steps, those before this call included.

    Raises:
        DivergedError: The loss or a parameter is not finite.
        ValueError: The newest checkpoint cannot be loaded.
    """
    trained = LossModule(networks, loss)
    modules = trained.networks
    if accelerator.num_processes > 1:
        trained = accelerator.prepare_model(trained)
    pending = _PendingHook()
    progress = TrainingProgress(config.steps, config.log_every, shown=accelerator.is_main_process)
    parts: dict[str, Stateful] = {"optimizer": optimizer, "schedule": schedule, "hook": pending, "progress": progress}
    parts |= state or {}
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    header = {**(metadata or {}), **native.header_of(networks, parameters)}
    step = first = _resume(run, parameters, parts)
    metrics = MetricsLog(run, first) if accelerator.is_main_process else None
    progress.start(first)

    def save() -> None:
        # without waiting for the other processes, which may be in the middle of a step when interrupted
        if metrics is not None:
            metrics.sync()
            save_checkpoint(run.checkpoints, step, parameters, parts, config.keep_checkpoints, header)

    interrupt = DeferredInterrupt()
    try:
        with fixed_parameters(modules, base_only=True):  # the base weight of an adapted layer is never trained here
            pending.run(observe, step, only_interrupted=True)
            while step < config.steps and not is_over():
                rate = float(schedule.get_last_lr()[0])
                with interrupt:
                    with fixed_parameters(modules, num_passes=config.gradient_accumulation_steps):
                        value = accumulate(accelerator, trained, config, seed, step, batch_at)
                    if step == first and accelerator.is_main_process:
                        _warn_of_unreached(parameters)
                    norm = update(accelerator, parameters, optimizer, schedule, config.max_grad_norm)
                    step += 1
                    pending.interrupted = observe is not None  # from now on, also by a signal during this step
                    _check_finite(value, step)
                    progress.advance(value, rate)
                    if metrics is not None and (step % config.log_every == 0 or step == config.steps):
                        losses = {"loss": progress.mean_loss, "last_loss": progress.take_last_loss()}
                        metrics.write(step, **losses, lr=rate, grad_norm=norm, seconds=progress.seconds)
                    if after_step is not None:
                        after_step(step)
                due = step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0)
                if due:  # before `observe` scores or draws them
                    _check_trained(parameters, step, last_step(run.checkpoints))
                pending.run(observe, step)
                if metrics is None:
                    continue  # only the main process saves
                with run.answering(SAVE_NOW) as asked:
                    wanted = asked or is_over()
                    if wanted and not due:
                        _check_trained(parameters, step, last_step(run.checkpoints))
                    if due or wanted:
                        save()
    except KeyboardInterrupt:
        if step > first:
            _check_trained(parameters, step, last_step(run.checkpoints))
            save()
        raise
    finally:
        progress.close()
        if metrics is not None:
            metrics.close()
    return step


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"The loss is {loss} at step {step}, {AGAIN}")


def _check_trained(parameters: Mapping[str, nn.Parameter], step: int, saved: int) -> None:
    if name := first_not_finite((name, parameter.detach()) for name, parameter in parameters.items()):
        kept = f"the checkpoint of step {saved} stays as it is" if saved else "nothing was saved"
        raise DivergedError(f"{name} has values that are NaN or infinite after step {step} ({kept}), {AGAIN}")


def _warn_of_unreached(parameters: Mapping[str, nn.Parameter]) -> None:
    """Warns of parameters without a gradient: the loss does not depend on them, so they stay as they are."""
    unreached = [name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None]
    if unreached:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in unreached))
        shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
        log.warning(
            "No gradient reaches %d of the trained layers, which this batch does not use: %s", len(layers), shown
        )


class _PendingHook:
    """Remembers in a checkpoint that `observe` was interrupted, so that a resumed run calls it again."""

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


def _resume(run: RunDirectory, parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Stateful]) -> int:
    found = checkpoints(run.checkpoints)
    return load_checkpoint(found[-1], parameters, parts) if found else 0


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
) -> float:
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

    Returns:
        The loss of the step.
    """
    micro_batches, expected = config.gradient_accumulation_steps, torch.zeros(())
    sums = torch.zeros(2, device=accelerator.device)
    for micro in range(micro_batches):
        number = step * micro_batches + micro
        stream = generator(seed, number, f"loss {accelerator.process_index}", accelerator.device)
        dropout_seed = generator(seed, number, f"dropout {accelerator.process_index}").initial_seed()
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
    whole = LossSum(*_over_processes(accelerator, sums))
    if micro_batches > 1:
        _scale_gradients(trained, (micro_batches * expected / whole.divisor).item())
    return whole.mean.item()


def _over_processes(accelerator: Accelerator, values: torch.Tensor) -> Any:
    """The sum of these values over all processes."""
    return accelerator.reduce(values.detach().clone(), "sum") if accelerator.num_processes > 1 else values


def _scale_gradients(trained: nn.Module, factor: float) -> None:
    if factor != 1:
        torch._foreach_mul_([p.grad for p in trained.parameters() if p.grad is not None], factor)


@contextlib.contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's global generators, from which dropout draws, and restores their state on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def update(
    accelerator: Accelerator,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float | None,
) -> float:
    """Clips the accumulated gradients, takes one step of optimizer and schedule, and returns the gradients' norm."""
    members = list(parameters.values())
    if max_grad_norm is None:
        accelerator.unscale_gradients()
        norm: Any = gradient_norm(members)
    else:
        norm = accelerator.clip_grad_norm_(members, max_grad_norm)
    optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # fp16 skips the step whose gradients overflowed
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


class TrainingProgress:
    """The mean loss, running and of the last steps, and the seconds of training, over all parts of a resumed run.

    Shows a bar with loss, learning rate and time left; plain lines if standard error is not a terminal.

    Args:
        total: The step that training ends at.
        every: Steps between two plain lines.
        shown: Whether to print anything.
    """

    def __init__(self, total: int, every: int, *, shown: bool):
        self.mean_loss = math.nan
        self._total, self._every, self._shown = total, every, shown
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._last_losses: list[float] = []

    def start(self, first: int) -> None:
        """Starts the clock of this process and the display, after `first` finished steps."""
        self._started = time.monotonic()
        self._step = self._first = first
        terminal = sys.stderr.isatty()
        self._lines = self._shown and not terminal
        hidden = not (self._shown and terminal)
        self._bar = tqdm(total=self._total, initial=first, unit="step", disable=hidden, dynamic_ncols=True)

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes up to their last checkpoint included."""
        return self._seconds_before + time.monotonic() - self._started

    def advance(self, loss: float, rate: float) -> None:
        """Records one finished step with its loss and learning rate."""
        self._step += 1
        self._last_losses.append(loss)
        # A running mean over some 50 steps: a single diffusion loss mostly reflects which timesteps were drawn. Until
        # there are so many it is the plain mean, since the first loss can be many times those that follow.
        share = max(1 / self._step, 0.02)
        self.mean_loss = loss if math.isnan(self.mean_loss) else (1 - share) * self.mean_loss + share * loss
        self._bar.set_postfix(loss=f"{self.mean_loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self._bar.update()
        if self._lines and (self._step % self._every == 0 or self._step == self._total):
            per_step = (time.monotonic() - self._started) / (self._step - self._first)
            left = per_step * (self._total - self._step)
            print(
                f"step {self._step}/{self._total}  loss {self.mean_loss:.4f}  lr {rate:.2e}"
                f"  {per_step:.2f} s/step  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )

    def take_last_loss(self) -> float:
        """The mean loss of the steps since the last call."""
        last, self._last_losses = self._last_losses, []
        return sum(last) / len(last)

    def state_dict(self) -> dict[str, Any]:
        return {"mean_loss": self.mean_loss, "seconds": self.seconds, "last_losses": self._last_losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean_loss, self._seconds_before = state_dict["mean_loss"], state_dict["seconds"]
        self._last_losses = list(state_dict["last_losses"])

    def close(self) -> None:
        self._bar.close()

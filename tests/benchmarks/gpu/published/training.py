"""A training as PEFT measures it: timed steps, a validation after some of them, and a test at the end."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from tests.benchmarks.gpu.published.record import Trained
from tests.benchmarks.gpu.run import Run

WARM_UP = 0.1  # of the steps, before the cosine


class Task(Protocol):
    """What is trained, and how it is scored."""

    model: nn.Module
    num_samples: int  # of the steps so far
    num_tokens: list[int]  # of each step; empty where nothing counts them
    scores_apart: bool  # whether the peak of the memory leaves preparation, validation and test out
    frees_every: int  # steps after which the allocator's cache is emptied, which counts as no step's time; 0: never

    def prepare(self) -> None:
        """Encodes inputs and measures the base model; its time counts as that of the training."""

    def loss(self, step: int) -> Tensor:
        """The loss of a step, from 1 on."""

    def validate(self) -> dict[str, float]:
        """The scores of a validation."""

    def test(self) -> dict[str, float]:
        """The scores at the end."""


@dataclass
class Memory:
    """What the allocator has reserved and allocated since the start, in bytes; 0 in a dry run."""

    device: torch.device
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        self.is_counted = self.device.type == "cuda"
        gc.collect()  # of what was trained before, which would hide what this one reserves
        self.restart()
        self.at_start = torch.cuda.memory_reserved(self.device) if self.is_counted else 0

    def free(self) -> None:
        if self.is_counted:
            torch.cuda.empty_cache()

    def restart(self) -> None:
        """Begins a new peak."""
        self.free()
        if self.is_counted:
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self) -> None:
        """Notes the state after a step."""
        counts = (torch.cuda.memory_reserved, torch.cuda.memory_allocated)
        found = [count(self.device) - self.at_start if self.is_counted else 0 for count in counts]
        self.reserved.append(found[0])
        self.allocated.append(found[1])

    def note_peak(self) -> None:
        if self.is_counted:
            self.peak = max(self.peak, torch.cuda.max_memory_reserved(self.device) - self.at_start)


def train(run: Run, task: Task, settings: dict[str, Any], memory: Memory) -> Trained:
    """Trains to the end, or until the time of the entry or the memory is over, which the status says."""
    parameters = list(task.model.parameters())
    trained = Trained(
        num_trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        num_total_params=sum(p.numel() for p in parameters),
        memory_log=memory.reserved,
    )
    start, validation = time.perf_counter(), [0.0]
    try:
        steps(run, task, settings, memory, trained, validation)
        trained.status = "success"
    except (TimeoutError, torch.OutOfMemoryError) as error:
        trained.status, trained.error_msg = "canceled", str(error)
    trained.train_time = time.perf_counter() - start - sum(validation)
    trained.memory_max = memory.peak
    return trained


def steps(
    run: Run, task: Task, settings: dict[str, Any], memory: Memory, trained: Trained, validation: list[float]
) -> None:
    """The steps and scores of `train`; the seconds of each validation are appended to `validation`."""
    start, losses, seconds = time.perf_counter(), list[float](), list[float]()
    optimizer, schedule = optimizer_of(task.model, settings)
    task.prepare()
    if task.scores_apart:
        memory.restart()
    task.model.train()
    every = settings["eval_steps"]
    for step in range(1, settings["max_steps"] + 1):
        if run.is_late():
            raise TimeoutError(f"the time of this entry was over after {step - 1} steps")
        began = time.perf_counter()
        losses.append(take_step(task, step, optimizer, schedule, settings["grad_norm_clip"]))
        memory.add()
        seconds.append(time.perf_counter() - began)
        if task.frees_every and step % task.frees_every == 0:
            memory.free()
        if step % every == 0:
            row = validation_row(task, step, losses[-every:], sum(seconds[-every:]), memory)
            validation.append(row["eval time"])
            trained.metrics.append(row | {"elapsed time": time.perf_counter() - start})
            print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    memory.note_peak()
    trained.metrics.append(last_row(task, settings["max_steps"], losses[-every:]))
    if not task.scores_apart:
        memory.note_peak()


def validation_row(task: Task, step: int, losses: Sequence[float], seconds: float, memory: Memory) -> dict[str, Any]:
    """The scores of a validation, and what the steps since the last one have cost.

    Args:
        task: What is trained.
        step: The last step.
        losses: Of those steps.
        seconds: Of them together.
        memory: After each of them; where `scores_apart`, a new peak begins after the validation.
    """
    memory.note_peak()
    began, count = time.perf_counter(), len(losses)
    scores = {f"valid {name}": value for name, value in evaluated(task, task.validate).items()}
    validation = time.perf_counter() - began
    if task.scores_apart:
        memory.restart()
    row = {"step": step, **scores, "train loss": fmean(losses), "train samples": task.num_samples}
    row |= {"train time": seconds, "eval time": validation}
    row |= {"tokens / sec": sum(task.num_tokens[-count:]) / seconds} if task.num_tokens else {}
    return row | {
        "mem allocated avg": fmean(memory.allocated[-count:]),
        "mem reserved avg": fmean(memory.reserved[-count:]),
    }


def last_row(task: Task, step: int, losses: Sequence[float]) -> dict[str, Any]:
    """The scores of the test, with the loss of the last steps."""
    found = evaluated(task, task.test)
    scores = {name if name in ("drift", "forgetting") else f"test {name}": value for name, value in found.items()}
    row = {"step": step, **scores, "train loss": fmean(losses), "train samples": task.num_samples}
    return row | ({"train total tokens": sum(task.num_tokens)} if task.num_tokens else {})


def evaluated(task: Task, score: Any) -> dict[str, float]:
    task.model.eval()
    with torch.inference_mode():
        found = score()
    task.model.train()
    return found


def take_step(task: Task, step: int, optimizer: Any, schedule: Any, clip: float) -> float:
    """One optimizer step, waited for."""
    optimizer.zero_grad(set_to_none=True)
    loss = task.loss(step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), clip)
    optimizer.step()
    schedule.step()
    return loss.item()


def optimizer_of(model: nn.Module, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW over all parameters with its schedule: warm-up and cosine, or a constant rate."""
    optimizer = torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"])
    if settings["lr_scheduler"] == "cosine":
        num_steps = settings["max_steps"]
        return optimizer, get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * num_steps), num_steps)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

"""A training that takes a moment."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from dora_mm.config.training import OptimizerConfig, ScheduleConfig, TrainConfig
from dora_mm.train.loop import fit
from dora_mm.train.metrics import read_metrics
from dora_mm.train.optim import build_optimizer
from dora_mm.train.schedule import Schedule
from dora_mm.utils.losses import LossSum
from dora_mm.utils.run_directory import RunDirectory


def small_training(
    run=None,
    *,
    optimizer=None,
    schedule="cosine",
    warmup=None,
    after_step=None,
    loss=None,
    dropout=0.0,
    seed=0,
    **train,
):
    """A small regression training whose data and noise depend on the step; `.fit()` runs it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    parameters = dict(network.named_parameters())
    config = TrainConfig(**{"steps": 12, "batch_size": 4, "log_every": 3, **train})
    built_optimizer = build_optimizer(parameters, OptimizerConfig(**(optimizer or {"lr": 0.05})))
    shape = ScheduleConfig(name=schedule, **(warmup or {}))
    built_schedule = Schedule(built_optimizer, shape, config.steps)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(built_optimizer)

    def batch_at(number):
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(number))

    def noisy_loss(x, generator):
        return (network(x) - torch.randn(4, 3, generator=generator)).square().mean()

    parts = {
        "accelerator": accelerator,
        "config": config,
        "seed": seed,
        "networks": {"network": network},
        "parameters": parameters,
        "optimizer": prepared,
        "schedule": built_schedule,
        "batch_at": batch_at,
        "loss": lambda x, generator: mean_of((loss or noisy_loss)(x, generator)),
    }
    return SimpleNamespace(
        network=network,
        optimizer=prepared,
        parts=parts,
        fit=lambda **hooks: fit(run=run, **parts, **{"after_step": after_step, **hooks}),
    )


def mean_of(losses):
    """The loss that is the mean of these."""
    return LossSum(losses.sum(), torch.tensor(float(losses.numel())))


def new_run(path):
    return RunDirectory.create("test", "", output=str(path))


def interrupt_at(step):
    def after_step(done):
        if done == step:
            raise KeyboardInterrupt

    return after_step


def metrics(run):
    return read_metrics(run.path / "metrics.jsonl")


def but_for_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
